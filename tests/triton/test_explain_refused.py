"""`explain_image` with wrong requests, many prompts and concurrent requests."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest
from explaining import MAPS, Answer, explain
from images import encode, photo
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException
from wire import TINY, GrpcCaller, HttpCaller

from siglip_serve.launcher import TritonServer

DOG = (TINY / "samples" / "dog.jpg").read_bytes()
SMALL = encode(photo(70, 50), "JPEG")
LARGEST = 2**24
EVERY = (*MAPS, "OVERLAY")


@pytest.fixture(scope="module")
def grpc(server: TritonServer) -> GrpcCaller:
    return GrpcCaller(server.grpc_url)


def refusal(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **named)
    assert caught.value.status() in {"StatusCode.INVALID_ARGUMENT", "400"}, caught.value
    message = str(caught.value.message())
    assert "Traceback" not in message
    assert ".py" not in message
    return message


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompts": []}, "PROMPTS: no rows, expected at least one"),
    ({"prompts": ["dog", ""]}, "PROMPTS[1]: the text is empty"),
    ({"prompts": ["dog", " \t"]}, "PROMPTS[1]: the text is empty"),
    ({"prompts": ["dog", "cat", b"\xff\xfe"]}, "PROMPTS[2]: not UTF-8 text (byte 0xff at position 0)"),
    ({"prompts": ["dog", "dog " * 300]}, "PROMPTS[1]: the text has 301 tokens and 64 fit"),
    ({"prompts": ["x" * 70_000]}, "PROMPTS[0]: 70000 bytes, at most 65536 are allowed"),
    ({"prompts": ["dog"] * 1025}, "PROMPTS: 1025 prompts"),
    ({"prompts": ["dog"] * 900, "BACKGROUND": ["sky"] * 200}, "900 prompts and 200 texts of BACKGROUND"),
    ({"prompts": ["dog"] * 1024, "TEMPLATE": ["{}"] * 65}, "65536 with their templates"),
    ({"TEMPLATE": ["{}", "a photo"]}, "TEMPLATE[1]: 'a photo' has 0 times {}"),
    ({"TEMPLATE": ["dog " * 100 + "{}"]}, "PROMPTS[0]: the text has 102 tokens"),
    ({"BACKGROUND": []}, "BACKGROUND: no rows"),
    ({"BACKGROUND": ["sky", b"\xff"]}, "BACKGROUND[1]: not UTF-8"),
    ({"BACKGROUND": ["sky", "dog " * 300]}, "BACKGROUND[1]: the text has 301 tokens"),
    ({"BACKGROUND": ["sky"], "MODE": ["absolute"]}, "BACKGROUND: means nothing in the MODE absolute"),
    ({"MODE": ["Relative"]}, "MODE: got 'Relative', expected one of relative, absolute"),
    ({"MODE": [b"\xff"]}, "expected one of relative, absolute"),
    (
        {"MODE": ["relative", "relative"]},
        "shape for input 'MODE' for model 'explain_image'. Expected [1], got [2]",
    ),
    ({"NORMALIZE": ["minmax"]}, "NORMALIZE: got 'minmax', expected one of none, prompt, joint"),
    ({"COLORMAP": ["hot"]}, "COLORMAP: got 'hot', expected one of bwr, jet, viridis, cividis"),
    ({"OPACITY": [1.5]}, "OPACITY: got 1.5, expected 0 to 1"),
    ({"OPACITY": [-0.1]}, "OPACITY: got -0.1"),
    ({"OPACITY": [float("nan")]}, "OPACITY: got nan"),
    ({"OPACITY": [0.1, 0.2]}, "shape for input 'OPACITY' for model 'explain_image'. Expected [1], got [2]"),
    ({"SIZE": [0, 10]}, "SIZE: 1 maps of 0x10"),
    ({"SIZE": [-5, 10]}, "SIZE: 1 maps of -5x10"),
    (
        {"SIZE": [4097, 4096]},
        f"SIZE: 1 maps of 4097x4096, expected sides of 1 to 8192 and at most {LARGEST}",
    ),
    ({"SIZE": [2**31 - 1, 2**31 - 1]}, "SIZE: 1 maps of 2147483647x2147483647"),
    ({"SIZE": [1, LARGEST]}, f"SIZE: 1 maps of 1x{LARGEST}, expected sides of 1 to 8192"),
    ({"SIZE": [10]}, "shape for input 'SIZE' for model 'explain_image'. Expected [2], got [1]"),
    ({"image": b"no image"}, "INPUT_IMAGE[0]: not a decodable image"),
    ({"image": b""}, "INPUT_IMAGE[0]: empty"),
    ({"image": DOG[: len(DOG) // 2]}, "INPUT_IMAGE[0]: truncated JPEG"),
    ({"image": [SMALL, SMALL]}, "shape for input 'INPUT_IMAGE' for model 'explain_image'. Expected [1,1]"),
    ({"image": []}, "input 'INPUT_IMAGE' for model 'explain_image'. Expected [1,1], got [0,1]"),
    ({"image": base64.b64encode(SMALL)}, "INPUT_IMAGE[0]: not a decodable image"),
    ({"parameters": {"base64_encoded": True}}, "INPUT_IMAGE[0]: not base64"),
    ({"parameters": {"embed_model": "siglip_text"}}, "parameter 'embed_model': got 'siglip_text'"),
    ({"parameters": {"overlay": True}}, "parameter 'overlay': unknown"),
    ({"parameters": {"truncation": "yes"}}, "parameter 'truncation': got 'yes'"),
    ({"outputs": ["HEATMAP"]}, "unexpected inference output 'HEATMAP' for model 'explain_image'"),
    ({"outputs": ["HEAT"]}, "unexpected inference output 'HEAT' for model 'explain_image'"),
]


@pytest.mark.parametrize(("request_", "expected"), REFUSED, ids=lambda case: str(case)[:60])
def test_refuses_a_wrong_request(request_: dict[str, Any], expected: str, grpc: GrpcCaller) -> None:
    """Requests come with and without overlays, since a step of their own paints these."""
    asked: dict[str, Any] = {"image": SMALL, "prompts": ["dog"], **request_}
    for outputs in (MAPS, EVERY):
        found = refusal(explain, grpc, **{"outputs": outputs, **asked})
        assert expected in found
    assert np.isfinite(explain(grpc, SMALL, ["dog"])["SCORES"]).all()


def test_refuses_wrong_types(grpc: GrpcCaller) -> None:
    module = grpc.module
    for name, kind, array, expected in (
        ("SIZE", "INT64", np.array([5, 5]), "INT32"),
        ("SIZE", "FP32", np.array([5, 5], dtype=np.float32), "INT32"),
        ("OPACITY", "FP64", np.array([0.5]), "FP32"),
        ("PROMPTS", "INT32", np.array([1], dtype=np.int32), "BYTES"),
    ):
        made = [module.InferInput("INPUT_IMAGE", [1, 1], "BYTES"), module.InferInput("PROMPTS", [1], "BYTES")]
        made[0].set_data_from_numpy(np.array([[SMALL]], dtype=np.object_))
        made[1].set_data_from_numpy(np.array([b"dog"], dtype=np.object_))
        wrong = module.InferInput(name, list(array.shape), kind)
        wrong.set_data_from_numpy(array)
        inputs = [one for one in made if one.name() != name] + [wrong]
        message = f"input '{name}' data-type is '{kind}', but model 'explain_image' expects '{expected}'"
        assert message in refusal(grpc.client.infer, "explain_image", inputs)


def test_truncates_long_prompts_on_request(grpc: GrpcCaller) -> None:
    found = explain(grpc, SMALL, ["dog " * 300, "cat"], parameters={"truncation": True})
    cut = explain(grpc, SMALL, ["dog " * 63, "cat"])
    np.testing.assert_allclose(found["SCORES"], cut["SCORES"], atol=1e-6)


def test_ignores_parameters_of_embeddings(grpc: GrpcCaller) -> None:
    plain = explain(grpc, SMALL, ["dog", "cat"])
    given = explain(
        grpc, SMALL, ["dog", "cat"], parameters={"embed_model": "siglip_vision", "normalized": True}
    )
    for name, array in plain.items():
        np.testing.assert_allclose(given[name], array, atol=1e-6)


def test_takes_and_returns_base64_over_grpc(grpc: GrpcCaller) -> None:
    plain = explain(grpc, SMALL, ["dog", "cat"], EVERY)
    given = explain(grpc, base64.encodebytes(SMALL), ["dog", "cat"], EVERY, {"base64_encoded": True})
    np.testing.assert_allclose(given["HEATMAPS"], plain["HEATMAPS"], atol=1e-6)
    for text, file in zip(given["OVERLAY"], plain["OVERLAY"], strict=True):
        assert base64.b64decode(text, validate=True) == file


def step(grpc: GrpcCaller, model: str, inputs: dict[str, Any]) -> None:
    tensors = []
    for name, given in inputs.items():
        array = np.array([[given]], dtype=np.object_) if isinstance(given, bytes) else given
        if isinstance(given, list):
            array = np.array([text.encode() for text in given], dtype=np.object_)
        kind = {"O": "BYTES", "i": "INT32", "f": "FP32"}[array.dtype.kind]
        tensors.append(grpc.module.InferInput(name, list(array.shape), kind))
        tensors[-1].set_data_from_numpy(array)
    grpc.client.infer(model, tensors)


def plan(*numbers: int) -> NDArray[np.int32]:
    return np.array(numbers, dtype=np.int32)


def right_inputs(grpc: GrpcCaller) -> dict[str, dict[str, Any]]:
    """Valid inputs of each step of `explain_image`, by its name."""
    side = explain(grpc, SMALL, ["dog"], ("PATCH_MAPS",))["PATCH_MAPS"].shape[1]
    size, ones = plan(50, 70)[None], np.ones
    texts = ones((2, grpc.embed([SMALL]).shape[1]), np.float32)
    maps: dict[str, Any] = {
        "FOUND_MAPS": ones((1, 2, side * side), np.float32),
        "FOUND_UNATTRIBUTED": ones((1, 2), np.float32),
        "EMBEDDING": texts[:1],
        "PROMPT_VECTORS": texts[None],
        "PROMPT_EMBEDDING": texts,
        "IMAGE_SIZE": size,
        "PLAN": plan(2, 1, 1, 0, 5, 7),
    }
    heat: dict[str, Any] = {
        "HEAT": ones((2, side, side), np.float32),
        "INPUT_IMAGE": SMALL,
        "IMAGE_SIZE": size,
        "PLAN": plan(2, 1, 1, 0, 5, 7),
    }
    return {
        "explain_prompts": {"IMAGE_SIZE": size, "PROMPTS": ["dog"]},
        "explain_vectors": {"TEXT_EMBEDDING": texts, "PLAN": plan(2, 1, 1, 0, 5, 7)},
        "explain_maps": maps,
        "explain_overlays": heat,
    }


def test_steps_refuse_wrong_direct_requests(grpc: GrpcCaller) -> None:
    """Any client of the server can call a step directly. No step may fail or take all memory."""
    right = right_inputs(grpc)
    maps, heat = right["explain_maps"], right["explain_overlays"]
    size, texts = maps["IMAGE_SIZE"], maps["PROMPT_EMBEDDING"]
    wrong_plans = [
        plan(0, 1, 1, 0, 5, 7),
        plan(2, 0, 1, 0, 5, 7),
        plan(2, 1, 1, 3, 5, 7),
        plan(2, 1, 1, -1, 5, 7),
        plan(2, 1, 1, 0, 0, 7),
        plan(2, 1, 1, 0, 40_000, 40_000),
        plan(2**31 - 1, 1, 1, 0, 5, 7),
    ]
    for model, inputs in right.items():
        step(grpc, model, inputs)
        for wrong in wrong_plans if "PLAN" in inputs else []:
            assert "PLAN: got [" in refusal(step, grpc, model, {**inputs, "PLAN": wrong})
        if "IMAGE_SIZE" in inputs:
            for wrong in (plan(0, 0)[None], plan(-5, 5)[None]):
                assert "IMAGE_SIZE: got" in refusal(step, grpc, model, {**inputs, "IMAGE_SIZE": wrong})
    for model, change, expected in (
        ("explain_prompts", {"IMAGE_SIZE": np.tile(size, (2, 1))}, "IMAGE_SIZE: got [[50, 70], [50, 70]]"),
        ("explain_vectors", {"TEXT_EMBEDDING": texts[:1]}, "TEXT_EMBEDDING: 1 rows"),
        ("explain_vectors", {"PLAN": plan(1, 3, 1, 0, 5, 7)}, "TEXT_EMBEDDING: 2 rows"),
        ("explain_maps", {"PROMPT_EMBEDDING": texts[:1]}, "PROMPT_EMBEDDING: 1 rows, expected 2"),
        ("explain_maps", {"PROMPT_VECTORS": texts[None, :1]}, "PROMPT_VECTORS: got float32"),
        ("explain_maps", {"FOUND_MAPS": maps["FOUND_MAPS"][..., 1:]}, "FOUND_MAPS: got float32"),
        (
            "explain_maps",
            {"FOUND_MAPS": maps["FOUND_MAPS"] * np.nan},
            "FOUND_MAPS[0, 0]: holds nan, expected values from -1e+12 to 1e+12",
        ),
        ("explain_maps", {"EMBEDDING": maps["EMBEDDING"] * 0}, "EMBEDDING[0]: all zero"),
        ("explain_maps", {"EMBEDDING": maps["EMBEDDING"] * 0 + 1e38}, "EMBEDDING[0]: holds 1e+38"),
        ("explain_maps", {"PROMPT_EMBEDDING": texts * 0 + 1e38}, "PROMPT_EMBEDDING[0]: holds 1e+38"),
        ("explain_maps", {"PROMPT_VECTORS": texts[None] * 0 + 1e38}, "PROMPT_VECTORS[0, 0]: holds 1e+38"),
        ("explain_vectors", {"TEXT_EMBEDDING": texts * 0 - 1e38}, "TEXT_EMBEDDING[0]: holds -1e+38"),
        ("explain_overlays", {"HEAT": heat["HEAT"] * np.inf}, "HEAT[0, 0]: holds "),
        ("explain_overlays", {"HEAT": heat["HEAT"][:1]}, "HEAT: 1 rows, expected 2"),
        ("explain_overlays", {"HEAT": heat["HEAT"][:, 1:]}, "HEAT: got float32"),
        ("explain_overlays", {"INPUT_IMAGE": b"no image"}, "INPUT_IMAGE[0]: not a decodable image"),
    ):
        assert expected in refusal(step, grpc, model, {**right[model], **change})


# ---- many prompts


def test_explains_two_hundred_prompts(grpc: GrpcCaller) -> None:
    prompts = [f"prompt number {number}" for number in range(200)]
    found = explain(grpc, SMALL, prompts)
    assert found["HEATMAPS"].shape == (200, 50, 70)
    total = found["PATCH_MAPS"].sum((1, 2)) + found["UNATTRIBUTED"]
    np.testing.assert_allclose(total, found["SCORES"], atol=1e-5)
    alone = explain(grpc, SMALL, prompts[7:8], MODE=["absolute"])["SCORES"]
    np.testing.assert_allclose(found["SCORES"][7:8], alone, atol=1e-5)


def test_limits_the_size_of_the_answer(grpc: GrpcCaller) -> None:
    side = int((LARGEST / 200) ** 0.5)
    found = explain(grpc, SMALL, ["dog"] * 199 + ["cat"], SIZE=[side, side])["HEATMAPS"]
    assert found.shape == (200, side, side)
    assert np.isfinite(found).all()
    message = refusal(explain, grpc, SMALL, ["dog"] * 200, SIZE=[side + 1, side + 1])
    assert f"SIZE: 200 maps of {side + 1}x{side + 1}" in message
    # Without SIZE, the maps shrink until they fit.
    large = encode(photo(1200, 900), "JPEG")
    found = explain(grpc, large, ["dog"] * 199 + ["cat"])["HEATMAPS"]
    assert LARGEST * 0.98 < found.size < LARGEST * 1.02
    assert np.isfinite(explain(grpc, SMALL, ["dog"] * 1024, MODE=["absolute"])["SCORES"]).all()


# ---- concurrent requests


def outcome(grpc: GrpcCaller, asked: dict[str, Any]) -> Answer | str:
    try:
        if asked.get("model") == "embed_image":
            return {"EMBEDDING": grpc.embed(asked["rows"])}
        return explain(grpc, **asked)
    except InferenceServerException as error:
        return str(error.message())


def mixed() -> list[dict[str, Any]]:
    """Requests of all kinds, answered and refused."""
    pictures = [encode(photo(60 + number, 50, number), "JPEG") for number in range(6)]
    kinds: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures):
        prompts = ["dog", "cat", "a red car", "grass"][: 1 + number % 4]
        kinds += [
            {"model": "embed_image", "rows": pictures[: 1 + number]},
            {"model": "embed_image", "rows": [picture, b"no image"]},
            {"image": picture, "prompts": prompts},
            {"image": picture, "prompts": [*prompts, f"number {number}"], "BACKGROUND": ["sky", "thing"]},
            {"image": picture, "prompts": prompts, "outputs": EVERY, "SIZE": [20, 30 + number]},
            {"image": picture, "prompts": [*prompts, ""]},
            {"image": picture, "prompts": prompts, "MODE": ["none"]},
            {"image": b"no image", "prompts": prompts},
        ]
    return kinds


def test_concurrent_requests_do_not_change_each_other(grpc: GrpcCaller) -> None:
    kinds = mixed()
    alone = [outcome(grpc, asked) for asked in kinds]
    assert sum(isinstance(one, str) for one in alone) == len(kinds) // 2
    order = list(range(len(kinds))) * 4
    random.Random(5).shuffle(order)
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda index: outcome(grpc, kinds[index]), order))
    for index, found in zip(order, together, strict=True):
        expected = alone[index]
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
            continue
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            if name == "OVERLAY":
                assert [len(file) > 100 for file in found[name]] == [True] * len(array)
            else:
                # The last digits of an embedding depend on the other rows of its pass.
                atol = 1e-3 if name == "EMBEDDING" else 1e-5
                np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=atol)


def test_serves_after_many_refusals(grpc: GrpcCaller) -> None:
    """Refusals must not add up: parallel steps once made Triton hang or end after some hundred of them."""
    for asked in (
        {"image": b"no image", "prompts": ["dog"]},
        {"image": SMALL, "prompts": [""]},
        {"image": SMALL, "prompts": ["dog"], "OPACITY": [2.0], "outputs": EVERY},
    ):
        for _ in range(150):
            assert isinstance(outcome(grpc, asked), str)
    assert isinstance(outcome(grpc, {"image": SMALL, "prompts": ["dog"], "outputs": EVERY}), dict)


def resident(server: TritonServer) -> dict[str, int]:
    """Resident bytes of each model process that takes part in explanations."""
    names = ("explain_", "siglip_vision_model", "siglip_text_model")
    found = {}
    for process in psutil.Process(server.pid).children(recursive=True):
        name = next((word for word in process.cmdline() if any(part in word for part in names)), "")
        if name:
            found[name] = process.memory_info().rss
    return found


def test_memory_does_not_grow_with_requests(server: TritonServer, grpc: GrpcCaller) -> None:
    picture = encode(photo(640, 480), "JPEG")

    def ask(count: int) -> None:
        for number in range(count):
            prompts = [f"thing {number} of {one}" for one in range(1 + number % 7)]
            explain(grpc, picture, prompts, EVERY if number % 4 == 0 else MAPS)

    ask(40)
    before = resident(server)
    assert len(before) >= 6
    ask(60)
    after = resident(server)
    assert before.keys() == after.keys()
    for name, size in after.items():
        # The arrays of 60 requests take some hundred megabytes, which would be seen if they stayed.
        assert size - before[name] < 40 * 2**20, (name, before[name], size)


# ---- the vision model


def pixels_of(grpc: GrpcCaller, rows: list[bytes]) -> NDArray[np.uint8]:
    return grpc.call("siglip_vision_process", rows, ["PIXEL_VALUES"])["PIXEL_VALUES"]


def tower(
    caller: GrpcCaller | HttpCaller,
    pixels: NDArray[np.uint8],
    vectors: NDArray[np.float32] | None,
    outputs: tuple[str, ...],
) -> Answer:
    module = caller.module
    inputs = [module.InferInput("PIXEL_VALUES", list(pixels.shape), "UINT8")]
    inputs[0].set_data_from_numpy(pixels)
    if vectors is not None:
        inputs.append(module.InferInput("PROMPT_VECTORS", list(vectors.shape), "FP32"))
        inputs[1].set_data_from_numpy(vectors)
    wanted = [module.InferRequestedOutput(name) for name in outputs]
    result = caller.client.infer("siglip_vision_model", inputs, outputs=wanted)
    return {name: result.as_numpy(name) for name in outputs}


def test_requests_with_and_without_vectors_share_the_tower(grpc: GrpcCaller) -> None:
    rows = [encode(photo(60, 50, seed), "JPEG") for seed in range(4)]
    pixels = pixels_of(grpc, rows)
    width = grpc.embed(rows[:1]).shape[1]
    rng = np.random.default_rng(0)
    asked: list[tuple[NDArray[np.uint8], NDArray[np.float32] | None, tuple[str, ...]]] = []
    for number in range(4):
        vectors = rng.normal(size=(1, 1 + number, width)).astype(np.float32)
        asked += [
            (pixels[number : number + 1], vectors, ("PATCH_MAPS", "UNATTRIBUTED", "EMBEDDING")),
            (pixels[: number + 1], None, ("EMBEDDING",)),
            (pixels[number : number + 1], None, ("EMBEDDING", "MEAN_EMBEDDING")),
        ]
    alone = [tower(grpc, *one) for one in asked]
    before = batches(grpc)
    order = list(range(len(asked))) * 12
    random.Random(6).shuffle(order)
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda index: tower(grpc, *asked[index]), order))
    assert batches(grpc) - before < len(order)  # some requests shared a batch
    for index, found in zip(order, together, strict=True):
        for name, array in alone[index].items():
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-3)
    maps = alone[0]
    embedding, explained = maps["EMBEDDING"][0], asked[0][1]
    assert explained is not None
    scores = explained[0] @ embedding / np.linalg.norm(embedding)
    np.testing.assert_allclose(maps["PATCH_MAPS"][0].sum(-1) + maps["UNATTRIBUTED"][0], scores, atol=1e-4)


def test_returns_every_possible_output_when_none_is_named(grpc: GrpcCaller) -> None:
    """Load generators name no output."""
    pixels = pixels_of(grpc, [encode(photo(60, 50, 1), "JPEG")])
    inputs = [grpc.module.InferInput("PIXEL_VALUES", list(pixels.shape), "UINT8")]
    inputs[0].set_data_from_numpy(pixels)
    found = grpc.client.infer("siglip_vision_model", inputs)
    expected = tower(grpc, pixels, None, ("EMBEDDING",))
    np.testing.assert_allclose(found.as_numpy("EMBEDDING"), expected["EMBEDDING"], rtol=1e-5, atol=1e-5)
    assert found.as_numpy("MEAN_EMBEDDING") is not None
    assert found.as_numpy("PATCH_MAPS") is None
    vectors = np.ones((1, 2, expected["EMBEDDING"].shape[1]), np.float32)
    inputs.append(grpc.module.InferInput("PROMPT_VECTORS", list(vectors.shape), "FP32"))
    inputs[1].set_data_from_numpy(vectors)
    explained = grpc.client.infer("siglip_vision_model", inputs)
    assert explained.as_numpy("PATCH_MAPS").shape[:2] == (1, 2)
    assert explained.as_numpy("MEAN_EMBEDDING") is None


def batches(grpc: GrpcCaller) -> int:
    statistics = grpc.client.get_inference_statistics("siglip_vision_model", as_json=True)
    return int(statistics["model_stats"][0]["execution_count"])


def test_vision_model_refuses_inputs_and_outputs_that_exclude_each_other(grpc: GrpcCaller) -> None:
    pixels = pixels_of(grpc, [SMALL, SMALL])
    width = grpc.embed([SMALL]).shape[1]
    vectors = np.ones((1, 2, width), dtype=np.float32)
    huge = vectors.copy()
    huge[0, 1, 3] = 1e38
    for asked, expected in (
        ((pixels[:1], None, ("PATCH_MAPS",)), "PATCH_MAPS: only of requests with the input PROMPT_VECTORS"),
        ((pixels[:1], vectors, ("MEAN_EMBEDDING",)), "MEAN_EMBEDDING: not of requests with"),
        ((pixels, np.concatenate([vectors] * 2), ("PATCH_MAPS",)), "PIXEL_VALUES: 2 images with vectors"),
        ((pixels, vectors, ("PATCH_MAPS",)), "batch size does not match"),
        ((pixels[:1], vectors[..., :-1], ("PATCH_MAPS",)), "input 'PROMPT_VECTORS'"),
        ((pixels[:1], vectors[:, :0], ("PATCH_MAPS",)), "PROMPT_VECTORS: 0 vectors, expected 1 to 1024"),
        (
            (pixels[:1], np.ones((1, 1025, width), np.float32), ("PATCH_MAPS",)),
            "PROMPT_VECTORS: 1025 vectors",
        ),
        ((pixels[:1], np.full_like(vectors, np.nan), ("PATCH_MAPS",)), "PROMPT_VECTORS[0, 0]: holds nan"),
        ((pixels[:1], huge, ("PATCH_MAPS",)), "PROMPT_VECTORS[0, 1]: holds 1e+38, expected values from"),
    ):
        assert expected in refusal(tower, grpc, *asked)
    assert np.isfinite(tower(grpc, pixels[:1], vectors, ("PATCH_MAPS",))["PATCH_MAPS"]).all()
