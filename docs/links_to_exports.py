"""`jupyter nbconvert --config docs/links_to_exports.py`: exported notebooks link to each other's exports."""

import re

from nbconvert.preprocessors import Preprocessor


class LinksToExports(Preprocessor):
    enabled = True

    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == "markdown":
            extension = resources["output_extension"]
            cell.source = re.sub(r"(\]\((?!https?:)[^)\s]*)\.ipynb(?=[)#])", rf"\1{extension}", cell.source)
        return cell, resources


c = get_config()  # noqa: F821  (nbconvert brings it)
c.Exporter.preprocessors = [LinksToExports]
