"""What Scalora costs (:mod:`benchmarks.cost`), studies of the method (:mod:`benchmarks.studies`), and their results.

Each script is run from the root of a checkout: ``python -m benchmarks.cost.overhead``.
"""
