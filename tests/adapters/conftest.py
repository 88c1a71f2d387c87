"""The CometD servers, for the tests of the line that speaks to them."""

from tests.support.peers import cometd_peer, faye_peer, node, tcp_proxy

__all__ = ["cometd_peer", "faye_peer", "node", "tcp_proxy"]
