"""How the image processors of transformers prepare an image: `preprocessor_config.json` as the
fields of a `ModelCard`.

Each class gives the keys its own meaning and its own defaults. The table is that of transformers
4.57 and 5.24. If these versions disagree about a default, a file without that key is refused:
nobody can know which of them the model was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from imagemill.models.card import MAX_SIDE, ModelCard, ReadCard, as_size
from imagemill.models.folders.json_file import Document
from imagemill.records import Centre, Interpolation

Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
Pair = Annotated[tuple[Side, ...], Meta(min_length=2, max_length=2)]
"""Height and width. (`int` with bounds beside `tuple[int, int]` crashes msgspec 0.22.)"""
Share = Annotated[float, Meta(ge=0.01, le=100)]
Number = Annotated[float, Meta(ge=-1e6, le=1e6)]
Positive = Annotated[float, Meta(ge=1e-9, le=1e6)]

_FILTERS: Final = (
    Interpolation.NEAREST,
    Interpolation.LANCZOS,
    Interpolation.BILINEAR,
    Interpolation.BICUBIC,
    Interpolation.BOX,
    Interpolation.HAMMING,
)
"""In the order of Pillow's numbers."""


class Mean(Enum):
    """Mean and deviation of red, green and blue that a class has by default."""

    STANDARD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    """The class does not normalise, whatever the file says."""


class Resizing(Enum):
    """What a class makes of `size`."""

    PLAIN = auto()
    CONVNEXT = auto()
    """Below 384 the short side becomes size / crop_pct, and the centre is cut out; from 384 on the
    image is squashed.
    """
    LEVIT = auto()
    """The short side becomes 256/224 of `shortest_edge`."""
    POOLFORMER = auto()
    """`size` is divided by crop_pct."""


class Size(Struct, frozen=True):
    """`size` or `crop_size`, pixels."""

    height: Side | None = None
    width: Side | None = None
    shortest_edge: Side | None = None
    longest_edge: Side | None = None
    max_height: Side | None = None
    max_width: Side | None = None


class Keys(Struct, frozen=True):
    """The keys of `preprocessor_config.json` that decide the pixels. None: missing or null."""

    do_resize: bool | None = None
    size: Side | Pair | Size | None = None
    crop_pct: Share | None = None
    resample: Annotated[int, Meta(ge=0, le=5)] | None = None
    do_center_crop: bool | None = None
    crop_size: Side | Pair | Size | None = None
    do_rescale: bool | None = None
    rescale_factor: Positive | None = None
    rescale_offset: bool | None = None
    do_normalize: bool | None = None
    image_mean: Number | tuple[Number, ...] | None = None
    image_std: Positive | tuple[Positive, ...] | None = None
    include_top: bool | None = None
    do_flip_channel_order: bool | None = None
    do_pad: bool | None = None
    default_to_square: bool | None = None
    use_square_size: bool | None = None


class Processor(Struct, frozen=True):
    """One class of image processors. None: its versions disagree about this default."""

    mean: Mean
    resample: Interpolation | None
    size: int | Pair | None
    short: bool = False
    """Whether a plain number in `size` is the length of the short side, not of both sides."""
    crop: int | None = None
    """Default of `crop_size`; None: the class does not crop."""
    crops: bool | None = True
    """Default of `do_center_crop`, if the class crops."""
    resizing: Resizing = Resizing.PLAIN
    crop_pct: float = 1.0
    efficientnet: bool = False
    """Whether `rescale_offset` and `include_top` count."""
    flips: bool = False
    """Whether `do_flip_channel_order` counts."""


_BILINEAR, _BICUBIC = Interpolation.BILINEAR, Interpolation.BICUBIC
_CLIP: Final = Processor(Mean.CLIP, _BICUBIC, 224, short=True, crop=224)
_MOBILENET: Final = Processor(Mean.STANDARD, _BILINEAR, 256, short=True, crop=224)

PROCESSORS: Final[Mapping[str, Processor]] = {
    "Beit": Processor(Mean.STANDARD, _BICUBIC, None, crop=224, crops=None),
    "Bit": _CLIP,
    "Blip": Processor(Mean.CLIP, _BICUBIC, 384),
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "ConvNext": Processor(
        Mean.STANDARD, None, 384, short=True, resizing=Resizing.CONVNEXT, crop_pct=224 / 256
    ),
    "DINOv3ViT": Processor(Mean.IMAGENET, _BILINEAR, 224),
    "DeiT": Processor(Mean.STANDARD, _BICUBIC, 256, crop=224),
    "EfficientFormer": Processor(Mean.IMAGENET, _BICUBIC, 224, crop=224),
    "EfficientNet": Processor(Mean.STANDARD, None, 346, crop=289, crops=False, efficientnet=True),
    "Levit": Processor(Mean.IMAGENET, _BICUBIC, 224, short=True, crop=224, resizing=Resizing.LEVIT),
    "MobileNetV1": _MOBILENET,
    "MobileNetV2": _MOBILENET,
    "MobileViT": Processor(Mean.NONE, None, 224, short=True, crop=256, flips=True),
    "PoolFormer": Processor(
        Mean.IMAGENET,
        _BICUBIC,
        224,
        short=True,
        crop=224,
        resizing=Resizing.POOLFORMER,
        crop_pct=0.9,
    ),
    "Pvt": Processor(Mean.IMAGENET, None, 224),
    "Segformer": Processor(Mean.IMAGENET, _BILINEAR, 512),
    "Siglip": Processor(Mean.STANDARD, _BICUBIC, (224, 224), short=True),
    "ViT": Processor(Mean.STANDARD, _BILINEAR, 224),
    "ViTHybrid": _CLIP,
}
"""Name of the class without `ImageProcessor` → what it does."""

MODEL_TYPES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("beit", "data2vec-vision"), "Beit"),
    **dict.fromkeys(("bit", "dinov2", "dinov2_with_registers", "focalnet", "hiera"), "Bit"),
    **dict.fromkeys(("pixio",), "Bit"),
    **dict.fromkeys(("blip", "blip-2", "instructblip"), "Blip"),
    **dict.fromkeys(
        ("aimv2", "aimv2_vision_model", "altclip", "clip", "clip_vision_model"), "CLIP"
    ),
    **dict.fromkeys(("git", "groupvit", "metaclip_2", "mlcd", "xclip"), "CLIP"),
    **dict.fromkeys(("chinese_clip", "chinese_clip_vision_model"), "ChineseCLIP"),
    **dict.fromkeys(("convnext", "convnextv2", "cvt", "regnet", "resnet", "van"), "ConvNext"),
    "dinov3_vit": "DINOv3ViT",
    "deit": "DeiT",
    "efficientformer": "EfficientFormer",
    **dict.fromkeys(("align", "efficientnet"), "EfficientNet"),
    "levit": "Levit",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    **dict.fromkeys(("mobilevit", "mobilevitv2"), "MobileViT"),
    "poolformer": "PoolFormer",
    **dict.fromkeys(("pvt", "pvt_v2"), "Pvt"),
    "segformer": "Segformer",
    **dict.fromkeys(("siglip", "siglip_vision_model"), "Siglip"),
    **dict.fromkeys(("clipseg", "dinat", "ijepa", "nat", "swiftformer"), "ViT"),
    **dict.fromkeys(("swin", "swinv2", "vit", "vit_mae", "vit_msn"), "ViT"),
    "vit_hybrid": "ViTHybrid",
}
"""`model_type` of `config.json` → its processor, if no file names one."""


def read_processor(document: Document, name: str) -> ReadCard:
    """Return what a processor's file says, as the fields of a card that decide the pixels.

    Args:
        document: `preprocessor_config.json`.
        name: a key of `PROCESSORS`.

    Raises:
        ModelError: a value makes no sense, or the file does not lead to one fixed input size.
    """
    return _Reader(document, name).card()


class _Reader:
    """One file on its way to a card; remembers which keys a field was read from."""

    def __init__(self, document: Document, name: str) -> None:
        self.document, self.name = document, name
        self.keys, self.kind = document.record(Keys), PROCESSORS[name]
        self.used: list[str] = []
        self.read = ReadCard(ModelCard())

    def value(self, key: str, default: Any) -> Any:
        """Return a key's value, or the default of the class."""
        found = getattr(self.keys, key)
        self.used.append(key)
        # For some versions null is false, for others it is the default.
        is_null = key in self.document.values and (default is True or key == "resample")
        if found is None and (default is None or is_null):
            raise self.document.error(
                f"{key} is {'null' if is_null else 'missing'}, and versions of transformers"
                f" disagree about the default of {self.name}ImageProcessor. Write the value that"
                " the model was trained with"
            )
        return default if found is None else found

    def origin(self) -> str:
        """Return where the values used since the last call came from."""
        said = [key for key in self.used if getattr(self.keys, key) is not None]
        defaults = [key for key in self.used if getattr(self.keys, key) is None]
        self.used = []
        if not said and not defaults:
            return f"{self.name}ImageProcessor"
        if not said:
            return f"default of {self.name}ImageProcessor"
        rest = f"; default: {', '.join(defaults)}" if defaults else ""
        return self.document.origin(*said) + rest

    def take(self, origin: str, **found: Any) -> None:
        """Take fields of the card over. Raises: ModelError."""
        try:
            self.read = self.read.plus(found, origin)
        except ValueError as error:
            raise self.document.error(str(error)) from None

    def card(self) -> ReadCard:
        """Return the card with the origins of its fields."""
        if self.keys.do_pad:
            raise self.document.error("do_pad is true: padding by a processor is not supported")
        if self.keys.use_square_size:
            raise self.document.error(
                "use_square_size is true: versions of transformers disagree about its meaning."
                " Write height and width into size instead"
            )
        resized = self._resized()
        resize_origin = self.origin()
        size = self._cropped(resized)
        if size is None:
            if not isinstance(resized, tuple):
                raise self.document.error(
                    "images are resized to different shapes, and no centre crop of one size"
                    " follows. Add do_center_crop and crop_size, or height and width in size"
                )
            size, self.used = resized, ["size"]
        self.take(self.origin(), size=as_size(*size))
        if isinstance(resized, tuple):
            self.take(resize_origin, resize=f"{resized[0]}x{resized[1]}")
        else:
            self.take(resize_origin, resize="none" if resized is None else resized)
        self.take(f"{self.name}ImageProcessor", centre=Centre.TRANSFORMERS)
        if resized is not None:
            default = self.kind.resample
            found = self.value("resample", None if default is None else _FILTERS.index(default))
            self.take(self.origin(), interpolation=_FILTERS[found])
        if self.kind.flips:
            flipped = self.value("do_flip_channel_order", True)
            self.take(self.origin(), color="BGR" if flipped else "RGB")
        self._normalisation()
        return self.read

    def _box_or_short(
        self, key: str, default: int | Pair | None, *, short: bool
    ) -> tuple[int, int] | int:
        """Return a size as (width, height), or as the length of the short side."""
        found = self.value(key, default)
        if isinstance(found, int):
            if key == "size" and self.keys.default_to_square is short:
                raise self.document.error(
                    f"default_to_square is {str(short).lower()}, and only some versions of"
                    " transformers follow it. Write height and width, or shortest_edge, into size"
                )
            return found if short else (found, found)
        if isinstance(found, tuple):
            return found[1], found[0]
        if found.longest_edge or found.max_height or found.max_width:
            raise self.document.error(
                f"{key} limits the longest edge, which is not supported. Give height and width, or"
                " shortest_edge"
            )
        if found.height and found.width and not found.shortest_edge:
            return found.width, found.height
        if found.shortest_edge and not (found.height or found.width):
            return int(found.shortest_edge)
        raise self.document.error(f"{key} must have height and width, or shortest_edge")

    def _resized(self) -> tuple[int, int] | int | None:
        """Return width and height of the resized image, or the length of its short side; None: it
        is not resized.
        """
        if not self.value("do_resize", True):
            return None
        size = self._box_or_short("size", self.kind.size, short=self.kind.short)
        match self.kind.resizing:
            case Resizing.CONVNEXT:
                if isinstance(size, tuple):
                    raise self.document.error("size must have shortest_edge")
                if size >= 384:
                    return size, size
                return max(1, int(size / self.value("crop_pct", self.kind.crop_pct)))
            case Resizing.LEVIT if isinstance(size, int):
                return int(256 / 224 * size)
            case Resizing.POOLFORMER:
                share = self.value("crop_pct", self.kind.crop_pct)
                if isinstance(size, tuple) and size[0] != size[1]:
                    return max(1, int(size[0] / share)), max(1, int(size[1] / share))
                side = size if isinstance(size, int) else size[0]
                return max(1, int(side / share))
        return size

    def _cropped(self, resized: tuple[int, int] | int | None) -> tuple[int, int] | None:
        """Return width and height of the crop; None: the class does not crop."""
        own = None
        if self.kind.resizing is Resizing.CONVNEXT and resized is not None:
            side = self._box_or_short("size", self.kind.size, short=True)
            assert isinstance(side, int)
            own = (side, side)
        if self.kind.crop is None:
            if not self.keys.do_center_crop:
                return own
            asked = self._box_or_short("crop_size", 224, short=False)
            if asked != (own or resized):
                raise self.document.error(
                    "do_center_crop is true, and versions of transformers disagree whether"
                    f" {self.name}ImageProcessor crops. Remove it, or make crop_size and size equal"
                )
            return own
        if not self.value("do_center_crop", self.kind.crops):
            return None
        crop = self._box_or_short("crop_size", self.kind.crop, short=False)
        if isinstance(crop, int):
            raise self.document.error("crop_size must have height and width")
        return crop

    def _normalisation(self) -> None:
        """Take over scale, mean and deviation. The rescaling is folded into them."""
        factor, offset = 1.0, 0.0
        if self.value("do_rescale", True):
            factor = self.value("rescale_factor", 1 / 255)
            if self.kind.efficientnet and self.value("rescale_offset", False):
                offset = 1.0
        is_usual = abs(factor * 255 - 1) < 1e-6
        unit = 1.0 if is_usual else factor
        self.take(self.origin(), scale=1 if is_usual else 255)
        default_mean, default_std = self.kind.mean.value
        normalises = self.kind.mean is not Mean.NONE and self.value("do_normalize", True)
        mean = self._three("image_mean", default_mean) if normalises else (0.0, 0.0, 0.0)
        self.take(self.origin(), mean=tuple((item + offset) / unit for item in mean))
        again = self.kind.efficientnet and self.value("include_top", True)
        divisions = int(normalises) + int(again)
        std = self._three("image_std", default_std) if divisions else (1.0, 1.0, 1.0)
        self.take(self.origin(), std=tuple(item**divisions / unit for item in std))

    def _three(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """Return one number per channel."""
        found = self.value(key, default)
        return three(self.document, key, found if isinstance(found, tuple) else (found,), 3)


def three(
    document: Document, key: str, values: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    """Return three numbers, which for grey images are equal. Raises: ModelError."""
    if len(values) not in (1, channels):
        raise document.error(f"{key} has {len(values)} numbers; it must have {channels}, or 1")
    return values * (3 // len(values))
