"""From drawn pixels to the file that is given out: watermark, encoding and signature, as the settings say.

Knows no HTTP and no Ray; whoever draws, a worker or a command, finishes its pictures here.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serve_app import watermark
from serve_app.image_codec import PILLOW_FORMATS, ImageEncoding, encode, facts_of, read_receipt
from serve_app.settings import Settings
from serve_app.signing import Signing
from zimage_engine.types import GenerationReport, GenerationResult, Notice

if TYPE_CHECKING:
    from PIL.Image import Image

#: The code of the notice that a picture has no watermark, or one that its file does not keep.
UNREADABLE = "watermark_unreadable"


@dataclass(frozen=True, slots=True)
class Finisher:
    """What is done to every picture. `signing` None: nothing is signed; `text` None: no watermark."""

    signing: Signing | None = None
    text: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> Finisher:
        """As the settings say. Raises InvalidRequest for a certificate or key that cannot sign."""
        signing = None
        if settings.c2pa_certificate is not None and settings.c2pa_key is not None:
            signing = Signing.load(
                settings.c2pa_certificate,
                settings.c2pa_key,
                settings.c2pa_algorithm,
                settings.c2pa_timestamp_url,
            )
        return cls(signing, settings.watermark)

    def finished(
        self, result: GenerationResult, encoding: ImageEncoding
    ) -> tuple[tuple[bytes, ...], GenerationReport]:
        """The files of the pictures, in their order, and the report with what was done to them.

        Raises SigningFailed where one that is to be signed cannot be: none of them is given out then.
        """
        report, files = result.report, []
        for index, image in enumerate(result.images):
            image, report = self._marked(image, report, index)
            file = encode(image, encoding, facts_of(report, index))
            if report.pictures[index].watermark and encoding.format != "png":
                report = self._with_notice_if_lost(file, report, index)
            files.append(file if self.signing is None else self.signing.signed(file, read_receipt(file)))
        return tuple(files), report

    def _marked(self, image: Image, report: GenerationReport, index: int) -> tuple[Image, GenerationReport]:
        if self.text is None:
            return image, report
        try:
            marked = watermark.marked(image.convert("RGB"), self.text)
        except watermark.NotMarkable as reason:
            return image, _noted(report, index, f"There is no watermark in this picture: {reason}.")
        return marked, _changed(report, index, watermark=self.text)

    def _with_notice_if_lost(self, file: bytes, report: GenerationReport, index: int) -> GenerationReport:
        from PIL import Image

        with Image.open(io.BytesIO(file), formats=PILLOW_FORMATS) as image:
            if watermark.read(image) == self.text:
                return report
        return _noted(
            report,
            index,
            "The watermark of this picture cannot be read from this file: it is compressed too much for its "
            "size; ask for PNG, less compression or a larger picture.",
        )


def _noted(report: GenerationReport, index: int, message: str) -> GenerationReport:
    warnings = report.pictures[index].warnings
    return _changed(report, index, warnings=(*warnings, Notice(UNREADABLE, message)))


def _changed(report: GenerationReport, index: int, **changes: object) -> GenerationReport:
    pictures = list(report.pictures)
    pictures[index] = replace(pictures[index], **changes)  # type: ignore[arg-type]
    return replace(report, pictures=tuple(pictures))
