# RetinaNet R50, 1x, with the extra pyramid levels of the published students: from the output of the FPN, not from its
# input as in mmdet and in the teachers.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

model = dict(neck=dict(add_extra_convs="on_output"))
