"""`fledge dash`: all runs of a folder in the browser, while they go on. No account, no network, no copy of a number."""
