"""Clients of served models: the transport, the validation of replies, and the counters of metrics pages."""
