"""The suite: a module for each subject, a test for each sentence of the specification.

A case is named ``<module>::<test>[<call>]``; see `pdcore_conformance.runner.plugin` for running it.
"""
