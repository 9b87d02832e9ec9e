"""What structured output may ask for: schemas, expressions and grammars, checked before they run.

Texts of clients are parsed and compiled in processes of their own, with a deadline and a bound on
memory. So a hostile text costs its own request, and neither the event loop nor the engine sees it
before it is known to be harmless. Never samples.
"""
