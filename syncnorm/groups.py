"""The workers that share a statistic: values that `process_group` may be.

| `process_group=` | the workers that pool together |
|---|---|
| `None` or `"world"` | all |
| `"node"` | those on one machine |
| `k`, an integer | runs of k neighbours by rank; k divides the number of workers |
| `for_samples(n, local_batch_size)` | as few neighbours as hold n samples together |
| `Ranks(members)` | these, by global rank; this worker among them |
| a `torch.distributed.ProcessGroup` | its members |
| a one-dimensional `DeviceMesh` | its members |

The first four are rules: stated before there are workers, the same on all of them, kept by copies,
pickles and checkpoints, and resolved anew for another number of workers. See `docs/modes.md`,
"Which workers".
"""

from syncnorm.comm.groups import Spec
from syncnorm.comm.rules import ForSamples, Ranks, for_samples

__all__ = ["ForSamples", "Ranks", "Spec", "for_samples"]
