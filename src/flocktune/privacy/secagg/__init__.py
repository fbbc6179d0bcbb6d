"""Secure aggregation by double masking (Bonawitz et al., CCS 2017): the server learns a sum, and none of its parts.

    fixed_point   numbers as integers whose sum can not wrap
    shamir        a secret in shares, of which a threshold is needed
    masks         keys, masks that cancel, sealed shares, signatures
    messages      what travels in each phase, and its shapes
    client        one client's phases: pure functions over what it remembers within a round
    server        the server's: pure functions over what came
    half          the phases around any method's client half

Formal guarantees: with honest clients on the list and a server that follows the protocol or not, what the server sees
of the clients whom it does not control is their sum, of at least ``threshold`` of the listed ones, under the hardness
of X25519, HKDF-SHA256 and ChaCha20 as pseudo-random functions, and Ed25519. docs/secure-aggregation.md says what
that does not cover.
"""
