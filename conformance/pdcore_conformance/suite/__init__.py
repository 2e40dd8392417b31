"""The conformance suite: a module for each subject, a test for each rule of the specification.

A case is named ``<module>::<test>[<call>]``; which `pdcore_conformance.runner.plugin` runs.
"""
