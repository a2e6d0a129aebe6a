"""The doctor: examines a folder of demonstrations before training.

With wrong cameras or poses, training runs without an error and the policy fails on the robot. The doctor projects the
gripper into the images, examines heights, rotations, the gripper, cameras and time stamps, and reports what is wrong
and what to do about it. It also draws a contact sheet that shows whether the projected gripper matches the real one.
Each check is a function of an `Examination`, in one file per subject; `run.py` lists them.
"""

from keygrip.data.robot.doctor.examination import Finding as Finding
from keygrip.data.robot.doctor.run import doctor as doctor
