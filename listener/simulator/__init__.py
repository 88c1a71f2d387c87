"""A contact centre on loopback: Genesys Web Services with scripted calls and faults on command.

::

    scripts.py   what is said about a call, in every dialect, and what should be known afterwards (pure)
    bayeux.py    the CometD server without I/O: sessions, queues, acknowledgements, advice, expiry
    faults.py    what goes wrong, once on command or at random from a seed
    cometd.py    its two transports, long-polling and websocket, and how faults look on the wire
    gws.py       the HTTP server: logins, REST, the control API
    party.py     what the two PBXs beside GWS share: a server, and answers that go wrong
    noojee.py    Noojee's six operations, and scripted calls that are heard by its subscribe
    click2dial.py  Click2Dial's one request, and records at the end of calls
    centre.py    plays scripts at a rate over many accounts, and knows what it sent

It is the other side: it shares nothing with the decoder, the fold and the session that it is there to
try. The behaviour of the CometD server follows CometD Java; where a rule comes from there, the code
says so.
"""
