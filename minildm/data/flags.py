"""The command line's data flags, one place for train.py, ``pretrain``, ``check`` and ``prompts``."""

from minildm.data.prompts import TEMPLATES
from minildm.data.reading import Transform
from minildm.data.records import open_data_set
from minildm.data.splits import SPLITS
from minildm.settings import at_least


def add_data_flags(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--views", default="frontal", choices=("frontal", "all"), help="which views to use")
    group.add_argument("--drop-pediatric", action="store_true", help="leave out what PadChest flags as paediatric")
    group.add_argument("--min-age", type=int, metavar="YEARS", help="leave out younger patients and unknown ages")
    group.add_argument("--limit", type=at_least(1), metavar="N", help="use N pictures, drawn with --seed")
    group.add_argument("--balance", metavar="FIELD", help="draw every class of this caption field as often")
    group.add_argument("--exclude", metavar="FILE", help="names to leave out, one a line, as check writes them")
    group.add_argument("--skip-bad", action="store_true", help="go on without absent or undecodable pictures")
    group.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help=f'"chest x-ray, age {{age}} {{sex}}", or a level: {", ".join(TEMPLATES)}; default: the data set\'s own',
    )
    group.add_argument("--split", default="80/16/4", choices=tuple(SPLITS), help="shares, by patient")
    group.add_argument("--size", type=int, default=512, help="pixels, a multiple of 8")
    group.add_argument("--fit", default="crop", choices=("crop", "pad"), help="to a square: centre crop, or black bars")
    group.add_argument(
        "--greys",
        default="declared",
        choices=("declared", "percentiles"),
        help="how deep greys become 8 bits: what the file declares, or its percentiles",
    )


def data_set_from(arguments, spec):
    """The flags -> DataSet. ``arguments`` also has ``seed``."""
    return open_data_set(
        spec,
        arguments.views,
        arguments.drop_pediatric,
        arguments.min_age,
        arguments.limit,
        arguments.exclude,
        arguments.skip_bad,
        arguments.seed,
    )


def transform_from(arguments):
    return Transform(arguments.size, arguments.fit, arguments.greys)
