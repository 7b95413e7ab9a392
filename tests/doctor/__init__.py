"""The doctor: what it says of machines that are made up, and with which exit code."""
