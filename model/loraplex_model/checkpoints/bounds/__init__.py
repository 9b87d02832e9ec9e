"""Bounds on the work and the memory of chat templates, which are programs of their authors.

`budget` counts while a template runs, `counting` puts the counts into its program, and `sizes` and
`filters` refuse operations whose result would be too large before they are carried out.
"""
