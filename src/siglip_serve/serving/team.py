"""Answer the steps of `fit_teams` and `classify_teams`: crops become jerseys, embeddings become teams."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.files import fingerprint
from siglip_serve.embeddings.unit import check_values
from siglip_serve.errors import InvalidInputError
from siglip_serve.images.resize import Pixels
from siglip_serve.serving.context import Context, readable_start
from siglip_serve.serving.counters import ImageCounter
from siglip_serve.serving.image_reader import ImageReader
from siglip_serve.serving.request import Request
from siglip_serve.serving.respond import Outputs, RequestModel
from siglip_serve.serving.rows import Row, map_rows
from siglip_serve.teams import clustering
from siglip_serve.teams.jersey import COLOR_ORDERS, ColorOrder, cut_box, jersey_roi, parse_region, rgb_frame
from siglip_serve.teams.state import TeamState

__all__ = ["JerseyProcess", "TeamFit", "TeamPredict"]

_MOST_CROPS = 4096
_STATES_KEPT = 64
_SOURCES = ("CROPS", "FRAME", "RAW_FRAME")
_ROLES = (b"player", b"goalkeeper", b"referee")


class JerseyProcess(RequestModel):
    """Crops, or a frame and boxes -> PIXEL_VALUES [n, S, S, 3] of the jerseys, REGION_FALLBACK, CROP_COUNT.

    CROPS [n] BYTES, or FRAME [1] BYTES or RAW_FRAME [H, W, C] UINT8 with BOXES [n, 4] FP32. CROP_COUNT is n.
    A batch has at least one row, so PIXEL_VALUES has one that means nothing where n is 0.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        with readable_start():
            self._region = parse_region(context.settings.jersey_region)
        # Jerseys are cut out of whole pictures.
        self._images = ImageReader(context, "pil" if context.settings.preprocess == "pil" else "fast")
        self._counter = ImageCounter(context.model)

    def answer(self, request: Request) -> Outputs:
        """Cut the jerseys out of the crops of a request."""
        fallbacks: list[bool] = []

        def jersey(crop: Pixels) -> Row:
            roi, whole = jersey_roi(crop, self._region)
            fallbacks.append(whole)
            return self._images.preprocess.resize(np.array(roi))  # a copy: contiguous, and writable for torch

        begin = time.perf_counter()
        given = [name for name in _SOURCES if request.has(name)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise InvalidInputError(
                f"got {got}, expected one of CROPS, FRAME with BOXES, RAW_FRAME with BOXES"
            )
        if given == ["CROPS"]:
            if request.has("BOXES"):
                raise InvalidInputError("BOXES: got them with CROPS, expected FRAME or RAW_FRAME with them")
            _color_order(request, raw=False)
            crops: Sequence[Any] = _bounded("CROPS", request.strings("CROPS"))
            with self._images.decoder(request) as decode:
                pixels = self._stack("CROPS", crops, lambda data: jersey(decode(data)))
        else:
            frame = self._frame(request, given[0])
            crops = _bounded("BOXES", request.array("BOXES", [4], np.float32, least=0))
            pixels = self._stack("BOXES", crops, lambda box: jersey(cut_box(frame, box)))
        self._counter.add(len(crops), time.perf_counter() - begin)
        return {
            "PIXEL_VALUES": pixels,
            "REGION_FALLBACK": np.array(fallbacks, dtype=np.bool_),
            "CROP_COUNT": np.array([len(crops)], dtype=np.int32),
        }

    def _frame(self, request: Request, name: str) -> Pixels:
        if not request.has("BOXES"):
            raise InvalidInputError(f"BOXES: missing, expected [n, 4] with {name}")
        if name == "FRAME":
            _color_order(request, raw=False)
            files = request.strings("FRAME")
            if len(files) != 1:
                raise InvalidInputError(f"FRAME: got {len(files)} frames, expected one")
            try:
                with self._images.decoder(request) as decode:
                    return decode(files[0])
            except InvalidInputError as error:
                raise error.at("FRAME", 0) from error
        frame = request.array("RAW_FRAME", request.shape("RAW_FRAME")[1:], np.uint8)
        order = _color_order(request, raw=frame.shape[-1] > 1)
        try:
            return rgb_frame(frame, order, self._images.limits)
        except InvalidInputError as error:
            raise error.at("RAW_FRAME") from error

    def _stack(self, name: str, rows: Sequence[Any], function: Any) -> NDArray[np.uint8]:
        if not len(rows):
            size = self._images.preprocess.size
            return np.zeros((1, size, size, 3), dtype=np.uint8)
        return map_rows(name, rows, function)


class TeamFit(RequestModel):
    """EMBEDDING [n, D] and all that is known of the crops -> STATE, STATUS and their teams."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._reducer = context.settings.team_reducer
        with readable_start():
            self._stamp = _stamp(context)
            clustering.warm_up(self._reducer)
        self._width = context.config.vision.hidden_size

    def answer(self, request: Request) -> Outputs:
        """Find the teams of a request's crops."""
        embeddings = _embeddings(request, self._width)
        found = clustering.fit(embeddings, self._hints(request, len(embeddings)), self._stamp, self._reducer)
        state = found.state.to_bytes() if found.state else b""
        return {
            "STATE": np.array([state], dtype=np.object_),
            "STATUS": np.array([status.encode() for status in found.status], dtype=np.object_),
            **_outputs(found.teams),
        }

    def _hints(self, request: Request, count: int) -> clustering.Hints:
        teams = request.optional("K", 1, np.int32)
        number = 2 if teams is None else int(teams[0])
        if not 2 <= number <= clustering.MOST_TEAMS:
            raise InvalidInputError(f"K: got {number}, expected 2 to {clustering.MOST_TEAMS}")
        anchors = request.optional("ANCHOR", count, np.int32)
        if anchors is not None:
            outside = np.flatnonzero((anchors < -1) | (anchors >= number))
            if len(outside):
                raise InvalidInputError(
                    f"ANCHOR[{outside[0]}]: got {anchors[outside[0]]}, "
                    f"expected -1 (unknown) to {number - 1}, as K is {number}"
                )
        previous = request.optional("PREV_STATE", 1, np.object_)
        return clustering.Hints(
            tracks=request.optional("TRACK_ID", count, np.int64),
            players=_players(request.optional("ROLE", count, np.object_)),
            anchors=anchors,
            previous=None if previous is None else _state("PREV_STATE", previous[0], self._stamp),
            teams=number,
        )


class TeamPredict(RequestModel):
    """EMBEDDING [n, D] and STATE -> LABELS, MARGIN, OUTLIER_SCORE and COORDINATES."""

    def __init__(self, context: Context) -> None:
        from threadpoolctl import threadpool_limits

        super().__init__(context)
        threadpool_limits(1)  # from here on: waking threads takes longer than these products
        with readable_start():
            stamp = _stamp(context)
        # Few matches are played at a time, and each sends the same state with every frame.
        self._state = lru_cache(maxsize=_STATES_KEPT)(partial(_state, "STATE", stamp=stamp))
        self._width = context.config.vision.hidden_size

    def answer(self, request: Request) -> Outputs:
        """Tell the team of each crop of a request."""
        states = request.strings("STATE")
        if len(states) != 1:
            raise InvalidInputError(f"STATE: got {len(states)} states, expected one")
        state = self._state(states[0])
        return _outputs(clustering.predict(state, _embeddings(request, self._width)))


def _stamp(context: Context) -> Mapping[str, str]:
    """Name all that the embeddings depend on. Pooling and colour order are fixed here, but not elsewhere."""
    settings, path = context.settings, context.config.path
    return {
        "version": "2",
        "encoder": f"{settings.checkpoint_name or path.name}:{fingerprint(path)}",
        "pooling": "mean",
        "region": str(parse_region(settings.jersey_region)),
        "color_order": "RGB",
    }


def _state(name: str, data: bytes, stamp: Mapping[str, str]) -> TeamState:
    try:
        return TeamState.from_bytes(data, stamp)
    except InvalidInputError as error:
        raise error.at(name) from error


def _embeddings(request: Request, width: int) -> NDArray[np.float32]:
    embeddings = request.array("EMBEDDING", [width], np.float32, least=0)
    count = request.optional("CROP_COUNT", 1, np.int32)
    rows = embeddings if count is None else embeddings[: int(count[0])]
    check_values("EMBEDDING", rows, finite=False)  # rows that are not finite are of no team
    return rows


def _outputs(teams: clustering.Teams) -> dict[str, NDArray[Any]]:
    return {
        "LABELS": teams.labels,
        "MARGIN": teams.margin,
        "OUTLIER_SCORE": teams.outlier_score,
        "COORDINATES": teams.coordinates,
    }


def _players(roles: NDArray[Any] | None) -> NDArray[np.bool_] | None:
    if roles is None:
        return None
    for index, role in enumerate(roles):
        if role not in (*_ROLES, b""):
            got = role[:40].decode(errors="replace")
            raise InvalidInputError(
                f"ROLE[{index}]: got {got!r}, expected player, goalkeeper, referee or nothing (player)"
            )
    return np.array([role in (b"player", b"") for role in roles], dtype=bool)  # also of no roles


def _color_order(request: Request, raw: bool) -> ColorOrder:
    """Return the colour order of a raw frame, which only the caller knows. Files know their own."""
    if request.has_parameter("color_order") != raw:
        expected = "RGB or BGR, as RAW_FRAME has colours" if raw else "none: files and grey frames need none"
        raise InvalidInputError(f"parameter 'color_order': expected {expected}")
    return cast(ColorOrder, request.choice("color_order", ",".join(COLOR_ORDERS))) if raw else "RGB"


def _bounded(name: str, rows: Any) -> Any:
    if len(rows) > _MOST_CROPS:
        raise InvalidInputError(f"{name}: got {len(rows)} crops, expected at most {_MOST_CROPS}")
    return rows
