"""Gates: when a span is evaluated. One file for each family of methods.

A gate is two things. Its settings are a pydantic model: a row of the table of policies, and a table of a policy file.
Its *rule* is the state of one request, which sees signals, proposes, and is told what was done. Guards, predictors and
AdaCorrection are not its business: `caching.gate_controller` puts them together.
"""
