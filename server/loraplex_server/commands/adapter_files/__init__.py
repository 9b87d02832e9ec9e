"""Commands on adapters outside of a running store: backups and signatures."""
