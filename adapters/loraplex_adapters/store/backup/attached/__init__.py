"""What a server keeps beside its store and a backup takes along: folders of files with names.

Which folders these are is the server's to say. A backup keeps each different content once, under
its SHA-256; a recovered folder is complete or absent.
"""
