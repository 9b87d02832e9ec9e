"""The audit log: what is recorded of calls, and the file that it is written to."""
