"""Drafts in training, one class per way of drafting."""

from specdec.distill.students.base import Guesser as Guesser
from specdec.distill.students.base import Loss as Loss
from specdec.distill.students.base import Student as Student
from specdec.distill.students.block import BlockStudent as BlockStudent
from specdec.distill.students.draft_model import DraftStudent as DraftStudent
from specdec.distill.students.parallel import ParallelStudent as ParallelStudent
from specdec.distill.students.scaling import scale as scale
from specdec.distill.students.scaling import unscale as unscale
from specdec.distill.students.sequential import HeadGuesser as HeadGuesser
from specdec.distill.students.sequential import HeadStudent as HeadStudent
from specdec.distill.students.sequential import unroll as unroll
