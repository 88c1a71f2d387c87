"""Hears every call notification of a contact centre and remembers it so that it can be proved.

The map; imports go down it only, and what stands on one line does not know its neighbours (`make check`
holds them to it)::

    cli                                what a person types
    demo, answers                      a contact centre to try it on; how answers look
    daemon                             composition root: builds, reloads, stops
    dialroom                           builds what places and hears dials
    settings | simulator | api         file < secrets < environment < flags; a contact centre; dials over HTTP
    pipeline | coverage | operations   JOINS: deliveries to the journal; gaps; /metrics and health
    dialwatch | switchboard | pbxwatch JOINS: outcomes of dials; who may dial; what PBXs say
    adapters | store | metrics         TALKS: CometD, GWS REST; REMEMBERS: SQL; each metric name, once
    core                               DECIDES: decode, normalise, the Bayeux session; pure
    errors                             what we say to a person

A notification travels: adapters.cometd -> core.session -> coverage -> pipeline -> core.decode ->
store.journal, which folds it (core.normalise) and commits -> acknowledged -> metrics; later store.history.
"""

__version__ = "0.1.0"
