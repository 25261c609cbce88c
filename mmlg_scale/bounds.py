"""How large anything may be that a file, a recipe or the command line asks for. Checked before memory is taken for it.

Each bound is far above what anybody trains today, and far below what would fill a machine without a word.
"""

MAX_LAYERS = 1000
"""Of a tower."""
MAX_WIDTH = 65_536
"""Of a tower, and of the joint embedding."""
MAX_IMAGE_SIZE = 8192
"""Pixels on a side."""
MAX_VOCABULARY = 10_000_000
MAX_CONTEXT = 16_384
"""Tokens of a caption."""
MAX_POSITION_NUMBERS = 2**28
"""Numbers in the embedding of an image's positions: patches times width."""
MAX_PARAMETERS = 50_000_000_000
"""Of one model. Whether this machine has the memory is asked before one is built."""
MAX_BLOCKS = 256
"""Multimodal blocks of a learngene, and unimodal blocks of a tower."""
MAX_KNOTS = 1000
MAX_CAPTIONS_PER_IMAGE = 64
"""Of a sample in a batch."""
MAX_STUDENTS = 1000
"""Sizes that share a step of the extraction."""
MAX_STEPS = 1_000_000_000
MAX_BATCH = 4_194_304
MAX_SCENES = 100_000_000
"""Images of a split of the procedural set."""
MAX_SOURCES = 256
"""Data sets of a mixture: each has files open."""
MAX_NAMES = 64
"""Names of a sample's captions that are drawn from."""
MAX_WORKERS = 1024
"""Loader processes, and CPU threads, of a rank."""
MAX_PROCESSES = 65_536
"""Ranks, and steps of a family that run side by side."""
MAX_JSON_BYTES = 16 * 2**20
"""Of a configuration, a result, a record of a run."""
MAX_JSON_DEPTH = 100
"""Objects and lists inside each other."""
MAX_MANIFEST_BYTES = 4 * 2**30
"""Of a split's manifest and of what is kept beside it: about 200 bytes a sample, so 20 million samples."""
MAX_TOKENIZER_BYTES = 50 * 2**20
MAX_TABLE_BYTES = 4 * 2**30
"""Of a table or a JSON file that is packed."""
MAX_IMAGE_BYTES = 2**28
"""Of an encoded image."""
MAX_RECIPE_BYTES = 256 * 2**10
MAX_YAML_VALUES = 50_000
"""Values of a YAML file with every alias written out."""
MAX_YAML_DEPTH = 50
MAX_CAPTION = 5_000
"""Characters of a caption: the time that byte pairs take grows with the square of a word's length."""
MAX_SAMPLE_TEXT_BYTES = 16 * 2**20
"""Of a sample's text or JSON in a shard."""
