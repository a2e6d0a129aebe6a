"""The doctor: examines a folder of demonstrations before anyone trains on it.

Wrong cameras or poses train without an error and fail on the robot. The doctor projects the gripper into the images,
examines heights, rotations, the gripper, cameras and time stamps, says what is wrong and what to do about it, and draws
a contact sheet that shows whether the projected gripper sits on the real one. Each check is a function of an
`Examination`, in a file of its subject; `run.py` lists them.
"""

from keygrip.data.robot.doctor.examination import Finding as Finding
from keygrip.data.robot.doctor.run import doctor as doctor
