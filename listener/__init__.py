"""Hears every call notification of a contact centre and remembers it so that it can be proved.

The map; imports go down it only, and what stands on one line does not know its neighbours (`make check`
holds them to it)::

    cli                                what a person types
    demo, answers                      a contact centre to try it on; how answers look
    daemon                             composition root: builds, reloads, stops
    settings | simulator               file < secrets < environment < flags; a contact centre on loopback
    pipeline | coverage | operations   JOINS: deliveries to the journal; gaps; /metrics and health
    adapters | store | metrics         TALKS: CometD, GWS REST; REMEMBERS: SQL; each metric name, once
    core                               DECIDES: decode, normalise, the Bayeux session; pure
    errors                             what we say to a person

A notification travels: adapters.cometd -> core.session -> coverage -> pipeline -> core.decode ->
store.journal, which folds it (core.normalise) and commits -> acknowledged -> metrics; later store.history.
"""

__version__ = "0.1.0"
