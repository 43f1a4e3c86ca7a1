"""The .pkl files that configs of MMEngine name besides weights, such as ``class_weight`` of a loss."""

from typing import IO, Any

from mmengine.fileio import PickleHandler, register_handler

from apt_dense.weights.files import CheckpointError
from apt_dense.weights.safe_unpickler import read_pickle


@register_handler(["pickle", "pkl"])
class ArraysPickleHandler(PickleHandler):
    """Lets ``mmengine.load`` read pickles of plain containers, arrays and tensors; MMEngine's own runs code in them."""

    def load_from_fileobj(self, file: IO[bytes], **kwargs: Any) -> Any:
        """Read an open file. Raises CheckpointError if it is damaged or holds anything else."""
        try:
            return read_pickle(file)
        except Exception as error:  # a damaged file can fail in any part of the reader
            raise CheckpointError(
                f"a .pkl file that the config names, such as class_weight of a loss, cannot be read: it is damaged or "
                f"holds pickled code, which is not run ({type(error).__name__}: {str(error)[:80]})"
            ) from error
