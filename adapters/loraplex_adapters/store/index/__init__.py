"""The index of the store: names, versions, labels, aliases and quarantines in a database."""
