"""What a kernel is chosen by."""

from typing import NamedTuple


class Case(NamedTuple):
    """The facts about a layer that decide which kernels can serve it.

    Attributes
    ----------
    cell : str
        "rnn", "lstm", "gru"; "embedding" for `embedding_backward`; else the kernel's own name.
    dtype : str
        Of the parameters: "float32" and so on.
    hidden_size, proj_size : int
        Sizes of the state; proj_size is 0 without a projection.
    nonlinearity : str
        "tanh" or "relu"; of an RNN.
    device : str
        The backend's name with its device, such as "cupy:1".
    """

    cell: str
    dtype: str
    hidden_size: int
    proj_size: int = 0
    nonlinearity: str = "tanh"
    device: str = "numpy"
