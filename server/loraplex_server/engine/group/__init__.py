"""Several engines as one: a process for each device, behind one front.

Decides which engine gets a request or an order, and joins what the engines report. Owns no process
(`process` does) and computes nothing.
"""
