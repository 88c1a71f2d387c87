"""Hears every call notification of a contact centre and remembers it so that it can be proved.

The map, in the order in which a notification travels::

    adapters/    TALKS      one outside party per file (CometD, GWS REST)
    core/        DECIDES    pure: decode, normalise, the Bayeux session; no clock, socket, log or await
    pipeline     JOINS      deliveries -> decode -> journal -> acknowledge -> observers
    store/       REMEMBERS  the only place that knows SQL
    metrics      every metric name, once
    operations   /metrics, /-/healthy, /-/ready
    simulator/   a contact centre on loopback, for the demo and the tests
    settings     file < secrets < environment < flags -> frozen Settings
    daemon       composition root
    demo, cli    what a person types

Imports go down this list only; `make check` holds them to it.
"""

__version__ = "0.1.0"
