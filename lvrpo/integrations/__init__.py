"""lvrpo inside trainers and models that people already have, a module for each.

Each needs its package (`pip install 'lvrpo[trl]'`) in a release that it is tested with, says so
where that is missing, and changes nothing when it is imported.
"""
