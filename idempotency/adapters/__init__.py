"""One flat module per framework or broker."""
