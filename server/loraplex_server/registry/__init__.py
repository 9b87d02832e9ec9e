"""The registered adapters: names, changes, quarantines, and which of them may be served."""
