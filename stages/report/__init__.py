"""`softcache report`: runs as one page that a person can look at, and as text for a pull request."""
