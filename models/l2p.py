"""L2P, Learning to Prompt (Wang et al., CVPR 2022, arXiv 2112.08654).

A frozen ViT reads, beside an image's patches, the tokens of the k entries of a pool whose keys lie nearest to the
image's query q(x), its class token without prompts:

    [cls, p_1 .. p_k, patches],   entries: the k largest cos(q(x), key_m);   z = W mean(prompt outputs) + b

One pool serves all tasks. Loss and choice: models.prompting.py; the network: convs/prompt_pool.py.
"""

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.prompt_pool import TokenPool
from models.base import LEARNERS
from models.prompting import PoolConfig, PoolLearner
from utils.config import Count, Rate
from utils.keys import key, redefault


@LEARNERS.register("l2p")
class L2P(PoolLearner):
    """A pool of prompt tokens, chosen per image by its query. Keeps no images."""

    class Config(PoolConfig):
        lrate: Rate = redefault(PoolConfig, "lrate", 1.875e-3)
        prompt_length: Count = key(5, "n, tokens of an entry")

    example = {"pool_size": 4, "top_k": 2, "prompt_length": 4, "lrate": 0.05, "epochs": 8}

    def build(self, make_backbone: BackboneMaker) -> None:
        config = self.config
        shape = config.pool_size, config.prompt_length, config.top_k
        self.network = TokenPool(
            make_backbone(), lambda width: LinearHead(width, init="trunc_normal"), config.normalize, *shape
        )
        self.network.head.grow(self.task.num_classes)
