"""The peers' fixtures, for the tests of the peers themselves."""

from tests.support.peers import cometd_peer, faye_peer, node, tcp_proxy

__all__ = ["cometd_peer", "faye_peer", "node", "tcp_proxy"]
