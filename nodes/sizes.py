"""Fit to Trained Size: a picture at a size that the model draws."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.errors import BitDanceError
from ..bitdance_core.sampling.fit import POSITIONS, crop_to, pad_to
from ..bitdance_core.sampling.sizes import ASPECTS, nearest_size, size_of_aspect
from .comfy.model import check_model
from .comfy.outputs import to_output
from .sockets import CATEGORY

CROP, PAD = "crop", "pad"
NEAREST = "nearest"  # of the aspects: the picture's own


class BitDanceFitSize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceFitSize",
            display_name="Fit to Trained Size",
            category=CATEGORY,
            description="Scales pictures to a size that the model was trained on: cropped, or padded with a mask of "
            "the new area to fill (outpainting).",
            search_aliases=["resize", "crop", "aspect ratio", "outpaint", "scale image"],
            inputs=[
                io.Model.Input("model", tooltip="The model that draws: its trained sizes are the choice."),
                io.Image.Input("image", tooltip="One image or more, of any size."),
                io.Combo.Input(
                    "mode",
                    options=[CROP, PAD],
                    default=CROP,
                    tooltip="crop: the picture covers the new size, and what sticks out is cut off. pad: all of it "
                    "stays, and the rest is new.",
                ),
                io.Combo.Input(
                    "aspect_ratio",
                    options=[NEAREST, *ASPECTS],
                    default=NEAREST,
                    tooltip="Width to height of the new size. nearest: the trained size whose shape is most like the "
                    "picture's.",
                ),
                io.Combo.Input(
                    "position",
                    options=list(POSITIONS),
                    default="center",
                    tooltip="crop: which part is kept. pad: where the picture lies on the canvas.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.1,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    tooltip="pad: the picture's size on the canvas; below 1 there is new area on all sides of a "
                    "centered picture.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The pictures at the trained size. New area repeats the border's pixels."),
                io.Mask.Output(
                    tooltip="1 where the area is new, 0 where the picture is. Connect it to the sampler's mask."
                ),
                io.Int.Output("width", tooltip="The trained width in pixels."),
                io.Int.Output("height", tooltip="The trained height in pixels."),
            ],
        )

    @classmethod
    def execute(cls, model, image, mode, aspect_ratio, position, scale) -> io.NodeOutput:
        host = check_model(model)
        if mode == CROP and scale != 1:
            raise BitDanceError(f"scale is {scale}, but a cropped picture covers all of the new size; set mode to pad")
        aspect = image.shape[2] / image.shape[1]
        size = (
            nearest_size(host.config, aspect) if aspect_ratio == NEAREST else size_of_aspect(host.config, aspect_ratio)
        )
        image = image[..., :3]
        if mode == CROP:
            fitted = crop_to(image, size, position)
            mask = fitted.new_zeros(fitted.shape[:3])
        else:
            fitted, mask = pad_to(image, size, host.autoencoder.downscale, position, scale)
        height, width = size
        return io.NodeOutput(
            to_output(fitted), to_output(mask), width, height, ui={"text": [f"{width}x{height} (width x height)"]}
        )
