"""Types that every module uses, and the legend of the axis letters in shapes.

===  =====================================  ===  =====================================
T    time steps                             I    ``input_size``
B    batch                                  H    ``hidden_size``
L    ``num_layers``                         P    ``proj_size``; H where there is none
D    directions (1 or 2)                    E    ``embedding_dim``
G    gates (RNN 1, GRU 3, LSTM 4)           V    ``vocab_size``
===  =====================================  ===  =====================================
"""

from typing import Any, TypeAlias

# The Array API standard has no types to import; what an array or a namespace must offer is checked at
# run time, once, in _array.py.
Array: TypeAlias = Any
Namespace: TypeAlias = Any
DType: TypeAlias = Any
