"""What runs load by and by is loaded first, to be left out of their garbage collections."""

import matplotlib.pyplot  # noqa: F401
import sklearn.datasets  # noqa: F401
