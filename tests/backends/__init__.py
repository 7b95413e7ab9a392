"""The backends over other people's libraries, without the libraries and without a GPU."""
