"""Lines at the start of a run."""

from parallel.division import Division, Outline
from parallel.mesh import Mesh
from training.describe import parts_of

STAGES = {"embed_tokens.weight": (0,), "norm.weight": (1,), "lm_head.weight": (1,)}


def test_what_a_rank_holds_of_a_model():
    outlines = {"embed_tokens.weight": Outline((100, 1000), "vocabulary")}
    outlines |= {f"layers.{number}.mlp.up.weight": Outline((1000, 1000), "column") for number in range(5)}
    outlines |= {"norm.weight": Outline((1000,)), "lm_head.weight": Outline((100, 1000), "vocabulary")}

    def stages_of(name: str) -> tuple[int, ...]:
        # Two stages a rank: blocks 0 and 3 lie on the first.
        return STAGES[name] if name in STAGES else (0,) if name.split(".")[1] in "03" else (1,)

    assert parts_of(Division(outlines, Mesh(0, tensor_size=2))) == "each rank holds 2.6 M of 5.2 M parameters"
    assert parts_of(Division(outlines, Mesh(3, pipe_size=2, tensor_size=2), stages_of)) == (
        "pipe rank 0: embedding, blocks 0 and 3, 1.1 M of 5.2 M parameters; "
        "pipe rank 1: blocks 1-2 and 4, head, 1.6 M of 5.2 M parameters"
    )
