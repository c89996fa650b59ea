"""Pipeline schedules as values, their check, and a simulator that prices them.

`make_schedule` -> `Schedule` -> `simulate` -> `Timeline` -> `memory_over_time`.
"""

from .bubble import dualpipe_bubble_s as dualpipe_bubble_s
from .csv_file import schedule_from_csv as schedule_from_csv
from .csv_file import schedule_to_csv as schedule_to_csv
from .dependencies import Transfer as Transfer
from .dependencies import dependencies as dependencies
from .dependencies import input_gradients as input_gradients
from .dependencies import programs as programs
from .dependencies import releases as releases
from .dependencies import transfers as transfers
from .errors import ScheduleError as ScheduleError
from .in_flight import max_in_flight as max_in_flight
from .instructions import Instruction as Instruction
from .instructions import Receive as Receive
from .instructions import Send as Send
from .instructions import global_order as global_order
from .instructions import instruction_lists as instruction_lists
from .instructions import verify_instructions as verify_instructions
from .memory import MeshMemory as MeshMemory
from .memory import StageBytes as StageBytes
from .memory import memory_over_time as memory_over_time
from .registry import SCHEDULES as SCHEDULES
from .registry import make_schedule as make_schedule
from .registry import schedule_name as schedule_name
from .simulate import Timeline as Timeline
from .simulate import simulate as simulate
from .task import BACKWARD as BACKWARD
from .task import BACKWARD_INPUT as BACKWARD_INPUT
from .task import BACKWARD_WEIGHT as BACKWARD_WEIGHT
from .task import FORWARD as FORWARD
from .task import KINDS as KINDS
from .task import Schedule as Schedule
from .task import Task as Task
from .times import TaskTimes as TaskTimes
from .times import equal_times as equal_times
from .verify import verify_schedule as verify_schedule
