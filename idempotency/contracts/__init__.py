"""What is stored or sent is a contract: check how it changes, fill it back, and compare old and new."""
