"""Audits of served engines, from outside, over HTTP."""
