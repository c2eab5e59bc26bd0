"""Text and source code: a file is a document, of any length."""

import codecs
from collections.abc import Iterator

from data_preprocess.readers import limits
from data_preprocess.readers.documents import cut_of
from data_preprocess.readers.items import DAMAGE, BadRecord, Document, one_line
from data_preprocess.readers.reader import OpenPiece, StreamReader


class TextReader(StreamReader):
    """Reader of texts, and of files with unknown endings that --include names."""

    endings = tuple(
        ".txt .md .rst .tex .html .css .py .pyi .c .h .cc .cpp .hpp .cu .java .js .ts .go .rs .rb .php .sh .sql".split()
    )
    well_known = (".txt",)
    holds_records = False

    def items(self, opened: OpenPiece) -> Iterator[Document | BadRecord]:
        """The file as one document. A damaged file is left out; if parts of it were given away before, the document
        ends at the damage."""
        path, decode = opened.piece.path, codecs.getincrementaldecoder("utf-8-sig")().decode
        text, position, given_away = "", 0, False
        while True:
            try:
                data = opened.stream.read(limits.LONGEST_PART)
                text += decode(data, final=not data)
            except (*DAMAGE, UnicodeDecodeError) as error:
                if given_away:
                    yield Document(text, path, "", 0)
                why = f"damaged ({one_line(error)})"
                if isinstance(error, UnicodeError):
                    why = f"not UTF-8 ({error.reason} at or after byte {position}): convert it, for example with iconv"
                yield BadRecord(path, f"{why}, what follows is lost" if given_away else why)
                return
            position += len(data)
            opened.report()
            if not data:
                break
            while len(text) > limits.LONGEST_PART:
                end = cut_of(text)
                yield Document(text[:end], path, "", 0, continued=True)
                text, given_away = text[end:], True
        if text:
            yield Document(text, path, "", 0)
