"""The code of an application in two versions, for tests in which processes of the old one are killed."""
