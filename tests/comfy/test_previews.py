"""Previews while a picture is drawn: as often as a person sees, and the last one."""

import pytest

PATCHES = 64


class Previewer:
    """Takes note of what it is asked to show."""

    def __init__(self):
        self.shown = []

    def decode_latent_to_preview_image(self, form, bits):
        self.shown.append(bits)
        return form, bits


@pytest.mark.parametrize(("seconds_a_patch", "expected"), [(0.01, 3), (0.1, 17), (1.0, PATCHES)])
def test_previews_come_three_times_a_second(pack, seconds_a_patch, expected):
    now, previewer = 0.0, Previewer()
    previews = pack.previews.Previews(previewer, PATCHES, lambda: now)
    for patch in range(PATCHES):
        now += seconds_a_patch
        shown = previews.show(patch)
        assert shown is None or shown == ("JPEG", patch)
    assert abs(len(previewer.shown) - expected) <= 1 and previewer.shown[-1] == PATCHES - 1
