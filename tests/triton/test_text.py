"""Text embeddings and classification by labels of a real server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from images import encode, photo
from numpy.typing import NDArray
from transformers import AutoTokenizer, SiglipModel
from tritonclient.utils import InferenceServerException
from wire import OPENER, TINY, GrpcCaller, HttpCaller

from siglip_serve.launcher import TritonServer

TEXTS = [
    "a dog",
    "A DOG!",
    "a photo of a cat.",
    "größer, naïve, 東京",
    "🐶 and 🐱",
    "x" * 300,
    " spaced   out ",
    "the quick brown fox jumps over the lazy dog",
]
PICTURE = encode(photo(80, 60), "JPEG")


def strings(module: Any, name: str, values: Sequence[str | bytes], shape: Sequence[int]) -> Any:
    tensor = module.InferInput(name, list(shape), "BYTES")
    rows = [value.encode() if isinstance(value, str) else value for value in values]
    tensor.set_data_from_numpy(np.array(rows, dtype=np.object_).reshape(shape))
    return tensor


def tensors(caller: GrpcCaller, inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
    made = []
    for name, array in inputs.items():
        dtype = "INT32" if array.dtype == np.int32 else "FP32"
        made.append(caller.module.InferInput(name, list(array.shape), dtype))
        made[-1].set_data_from_numpy(array)
    return made


def unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    precise = rows.astype(np.float64)
    return precise / np.linalg.norm(precise, axis=1, keepdims=True)


def embed(
    caller: GrpcCaller | HttpCaller,
    texts: Sequence[str | bytes],
    model: str = "embed_text",
    **parameters: Any,
) -> NDArray[np.float32]:
    tensor = strings(caller.module, "INPUT_TEXT", texts, (len(texts), 1))
    return caller.client.infer(model, [tensor], parameters=parameters or None).as_numpy("EMBEDDING")


def classify(
    server: TritonServer,
    images: Sequence[bytes],
    labels: Sequence[str | bytes],
    templates: Sequence[str] = (),
    **parameters: Any,
) -> NDArray[np.float32]:
    caller = GrpcCaller(server.grpc_url)
    inputs = [
        strings(caller.module, "INPUT_IMAGE", images, (len(images), 1)),
        strings(caller.module, "LABELS", labels, (len(labels),)),
    ]
    if templates:
        inputs.append(strings(caller.module, "TEMPLATE", templates, (len(templates),)))
    result = caller.client.infer("classify_image", inputs, parameters=parameters or None)
    return result.as_numpy("PROBABILITIES")


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert caught.value.status() in {"StatusCode.INVALID_ARGUMENT", "400"}
    return str(caught.value.message())


def test_text_embeddings_equal_transformers(server: TritonServer) -> None:
    model = SiglipModel.from_pretrained(TINY).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    context = model.config.text_config.max_position_embeddings
    ids = tokenizer(TEXTS, padding="max_length", max_length=context, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        theirs = model.text_model(ids["input_ids"]).pooler_output.numpy()
    ours = embed(GrpcCaller(server.grpc_url), TEXTS, truncation=True)
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() >= 0.999999


def test_all_ways_to_send_agree(server: TritonServer) -> None:
    grpc = GrpcCaller(server.grpc_url)
    expected = embed(grpc, ["a dog", "a cat"])
    for got in (
        embed(grpc, ["a dog", "a cat"], "siglip_text"),
        embed(HttpCaller(server.http_url), ["a dog", "a cat"]),
        embed(grpc, ["a dog", "a cat"], embed_model="siglip_text"),
        np.concatenate([embed(grpc, ["a dog"]), embed(grpc, ["a cat"])]),
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    unit = embed(grpc, ["a dog"], normalized=True)
    np.testing.assert_allclose(np.linalg.norm(unit), 1.0, rtol=1e-5)


def test_concurrent_requests_keep_their_own_rows(server: TritonServer) -> None:
    """Requests mix new texts, known texts, and texts that repeat within the request."""
    texts = [f"{kind} number {number}" for kind in ("dog", "car", "tree") for number in range(40)]
    grpc = GrpcCaller(server.grpc_url)
    rng = np.random.default_rng(3)
    requests = [rng.integers(len(texts), size=rng.integers(1, 17)) for _ in range(100)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda rows: embed(grpc, [texts[i] for i in rows]), requests))
    known = np.concatenate([embed(grpc, [text]) for text in texts])
    for rows, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer, known[rows], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("texts", "parameters", "expected"),
    [
        (["a dog", ""], {}, "INPUT_TEXT[1]: the text is empty"),
        (["  \t\n"], {}, "INPUT_TEXT[0]: the text is empty"),
        (["a dog", b"\xff\xfe"], {}, "INPUT_TEXT[1]: not UTF-8 text"),
        (["a dog", "dog " * 300], {}, "INPUT_TEXT[1]: the text has 301 tokens"),
        ([" " * 70_000 + "dog"], {}, "INPUT_TEXT[0]: 70003 bytes, at most 65536 are allowed"),
        (["a dog"], {"truncate": True}, "parameter 'truncate': unknown"),
        (["a dog"], {"truncation": 1}, "parameter 'truncation': got 1"),
        (["a dog"], {"truncation": "longest"}, "expected true or false, or one of longest_first, only_first"),
        (["dog " * 300], {"truncation": "do_not_truncate"}, "INPUT_TEXT[0]: the text has 301 tokens"),
        (["a dog"], {"embed_model": "siglip_vision"}, "expected one of siglip_text"),
    ],
)
def test_refuses_a_wrong_text(
    texts: list[str | bytes], parameters: dict[str, Any], expected: str, server: TritonServer
) -> None:
    caller = GrpcCaller(server.grpc_url)
    assert expected in refusal(lambda: embed(caller, texts, **parameters))
    assert np.isfinite(embed(caller, ["a dog"])).all()


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_strategies_of_transformers_cut_a_long_text(strategy: str, server: TritonServer) -> None:
    expected = embed(GrpcCaller(server.grpc_url), ["dog " * 300], truncation=True)
    for caller in (GrpcCaller(server.grpc_url), HttpCaller(server.http_url)):
        got = embed(caller, ["dog " * 300], truncation=strategy)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_refuses_ids_outside_the_vocabulary(server: TritonServer) -> None:
    caller = GrpcCaller(server.grpc_url)
    context = caller.client.get_model_metadata("siglip_text_model").inputs[0].shape[1]
    ids = np.zeros((2, context), dtype=np.int64)
    ids[1, 3] = 10**9
    tensor = caller.module.InferInput("INPUT_IDS", ids.shape, "INT64")
    tensor.set_data_from_numpy(ids)
    assert "INPUT_IDS[1]: an id outside" in refusal(
        lambda: caller.client.infer("siglip_text_model", [tensor])
    )


def test_probabilities_follow_the_checkpoints_scale_and_bias(server: TritonServer) -> None:
    model = SiglipModel.from_pretrained(TINY).eval()
    grpc = GrpcCaller(server.grpc_url)
    labels = ["dog", "cat", "fire engine"]
    images = torch.tensor(grpc.embed([PICTURE, PICTURE], normalized=True))
    texts = torch.tensor(embed(grpc, labels, normalized=True))
    logits = (images @ texts.T * model.logit_scale.exp() + model.logit_bias).detach()
    pairs = classify(server, [PICTURE, PICTURE], labels)
    np.testing.assert_allclose(pairs, logits.sigmoid(), rtol=1e-3, atol=1e-6)
    alone = classify(server, [PICTURE], labels[:1])
    np.testing.assert_allclose(alone, pairs[:1, :1], rtol=1e-3, atol=1e-6)
    competing = classify(server, [PICTURE, PICTURE], labels, softmax=True)
    np.testing.assert_allclose(competing, logits.softmax(1), rtol=1e-3, atol=1e-6)


def test_small_probabilities_and_logits_equal_double_precision(server: TritonServer) -> None:
    """Logits of the checkpoint's own pairs reach little below -20: the vectors here go further."""
    caller = GrpcCaller(server.grpc_url)
    model = SiglipModel.from_pretrained(TINY)
    scale, bias = model.logit_scale.detach().double().exp().item(), model.logit_bias.detach().item()
    rng = np.random.default_rng(5)
    width = caller.embed([PICTURE]).shape[1]
    images = rng.normal(size=(3, width)).astype(np.float32) * 7
    prompts = rng.normal(size=(1500, width)).astype(np.float32)
    prompts[::2] -= images[0] * np.linspace(0, 2, 750, dtype=np.float32)[:, None]
    inputs = {
        "IMAGE_EMBEDDING": images,
        "PROMPT_EMBEDDING": prompts,
        "TEMPLATE_COUNT": np.array([1], np.int32),
    }
    result = caller.client.infer("label_scores", tensors(caller, inputs))
    cosines = unit(images) @ unit(prompts).T
    expected = scale * cosines + bias
    assert expected.min() < -25
    np.testing.assert_allclose(result.as_numpy("LOGITS"), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.as_numpy("PROBABILITIES"), 1 / (1 + np.exp(-expected)), rtol=1e-5)
    competing = caller.client.infer("label_scores", tensors(caller, inputs), parameters={"softmax": True})
    shares = np.exp(expected - expected.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(competing.as_numpy("PROBABILITIES"), shares, rtol=1e-5)
    np.testing.assert_array_equal(competing.as_numpy("LOGITS"), result.as_numpy("LOGITS"))


def test_gives_each_of_its_outputs_alone(server: TritonServer) -> None:
    caller = GrpcCaller(server.grpc_url)
    inputs = [
        strings(caller.module, "INPUT_IMAGE", [PICTURE], (1, 1)),
        strings(caller.module, "LABELS", ["dog", "cat"], (2,)),
    ]
    both = caller.client.infer("classify_image", inputs)
    logits = both.as_numpy("LOGITS").astype(np.float64)
    np.testing.assert_allclose(both.as_numpy("PROBABILITIES"), 1 / (1 + np.exp(-logits)), rtol=1e-5)
    for name in ("PROBABILITIES", "LOGITS"):
        wanted = [caller.module.InferRequestedOutput(name)]
        alone = caller.client.infer("classify_image", inputs, outputs=wanted, client_timeout=30)
        assert [output.name for output in alone.get_response().outputs] == [name]
        np.testing.assert_array_equal(alone.as_numpy(name), both.as_numpy(name))


@pytest.mark.parametrize("value", [1e38, np.inf, np.nan])
@pytest.mark.parametrize(("name", "row"), [("IMAGE_EMBEDDING", 1), ("PROMPT_EMBEDDING", 2)])
def test_scores_refuse_vectors_that_would_overflow(
    name: str, row: int, value: float, server: TritonServer
) -> None:
    caller = GrpcCaller(server.grpc_url)
    width = caller.embed([PICTURE]).shape[1]
    inputs = {
        "IMAGE_EMBEDDING": np.ones((2, width), np.float32),
        "PROMPT_EMBEDDING": np.ones((4, width), np.float32),
        "TEMPLATE_COUNT": np.array([2], np.int32),
    }
    assert caller.client.infer("label_scores", tensors(caller, inputs)).as_numpy("LOGITS").shape == (2, 2)
    inputs[name][row, 3] = value
    message = refusal(lambda: caller.client.infer("label_scores", tensors(caller, inputs)))
    assert f"{name}[{row}]: holds {value:g}, expected values from -1e+12 to 1e+12" in message


def test_averages_templates(server: TritonServer) -> None:
    grpc = GrpcCaller(server.grpc_url)
    labels, templates = ["dog", "cat"], ["a photo of a {}.", "{} {}"]
    prompts = ["a photo of a dog.", "dog dog", "a photo of a cat.", "cat cat"]
    classes = embed(grpc, prompts, normalized=True).reshape(2, 2, -1).mean(1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    model = SiglipModel.from_pretrained(TINY)
    cosine = torch.tensor(grpc.embed([PICTURE], normalized=True) @ classes.T)
    expected = (cosine * model.logit_scale.exp() + model.logit_bias).sigmoid().detach()
    np.testing.assert_allclose(classify(server, [PICTURE], labels, templates), expected, rtol=1e-3, atol=1e-6)


def tower_rows(server: TritonServer) -> float:
    url = f"http://{server.address}:{server.metrics_port}/metrics"
    with OPENER.open(url, timeout=60) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith('siglip_serve_tower_rows_total{model="siglip_text_model"'):
                return float(line.split()[-1])
    return 0.0


def test_known_labels_skip_the_text_tower(server: TritonServer) -> None:
    before = tower_rows(server)
    labels = [f"thing number {number}" for number in range(1000)]
    first = classify(server, [PICTURE], labels)
    assert first.shape == (1, 1000)
    after = tower_rows(server)
    assert after == before + 1000
    again = classify(server, [PICTURE], labels[::-1])
    np.testing.assert_allclose(again[:, ::-1], first, rtol=1e-4, atol=1e-7)
    assert tower_rows(server) == after


def test_new_texts_from_many_callers_are_computed_once(server: TritonServer) -> None:
    """Some callers hold a text that is refused as well."""
    grpc = GrpcCaller(server.grpc_url)
    texts = [f"a dog behind {number} houses" for number in range(3)]
    before = tower_rows(server)

    def ask(caller: int) -> NDArray[np.float32] | str:
        if caller % 4 == 3:
            return refusal(lambda: embed(grpc, [*texts, ""]))
        return embed(grpc, [*texts, *texts])

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(64)))
    assert tower_rows(server) == before + 3
    expected = embed(grpc, [*texts, *texts])
    for caller, answer in enumerate(answers):
        if isinstance(answer, str):
            assert caller % 4 == 3
            assert answer.endswith("INPUT_TEXT[3]: the text is empty")
        else:
            np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize(
    ("images", "labels", "templates", "expected"),
    [
        ([PICTURE], ["dog", ""], [], "LABELS[1]: the text is empty"),
        ([PICTURE], ["dog", b"\xff"], [], "LABELS[1]: not UTF-8"),
        ([PICTURE], [], [], "LABELS: no rows"),
        ([PICTURE], ["dog"], ["a photo"], "TEMPLATE[0]: 'a photo' has 0 times {} where the label goes"),
        ([PICTURE], ["dog"], ["{}" * 5], "expected 1 to 4"),
        ([PICTURE], ["x" * 70_000], [], "LABELS[0]: 70000 bytes, at most 65536 are allowed"),
        ([PICTURE], ["dog"] * 1000, ["{} " + str(n) for n in range(100)], "expected at most 65536 prompts"),
        ([PICTURE], ["dog " * 300], [], "the text has 301 tokens"),
        ([PICTURE, b"no image"], ["dog"], [], "INPUT_IMAGE[1]: not a decodable image"),
    ],
)
def test_refuses_a_wrong_classification(
    images: list[bytes], labels: list[str | bytes], templates: list[str], expected: str, server: TritonServer
) -> None:
    assert expected in refusal(lambda: classify(server, images, labels, templates))
    assert classify(server, [PICTURE], ["dog"]).shape == (1, 1)


def test_serves_after_many_refusals(server: TritonServer) -> None:
    """Refusals must not add up: parallel steps once made Triton hang or end after some hundred of them."""
    caller = GrpcCaller(server.grpc_url)
    inputs = [
        strings(caller.module, "INPUT_IMAGE", [PICTURE, b"no image"], (2, 1)),
        strings(caller.module, "LABELS", ["dog"], (1,)),
    ]
    for _ in range(400):
        with pytest.raises(InferenceServerException, match=r"INPUT_IMAGE\[1\]: not a decodable image"):
            caller.client.infer("classify_image", inputs, client_timeout=30)
    assert classify(server, [PICTURE], ["dog"]).shape == (1, 1)
