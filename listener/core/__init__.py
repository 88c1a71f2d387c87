"""DECIDES. Pure: no clock, socket, log, randomness or await; time comes in, facts come out.

`calls` is the vocabulary; `decode` ends Genesys' spelling; `normalise` keeps the table of states;
`session` is a Bayeux session without I/O and knows none of the others.
"""
