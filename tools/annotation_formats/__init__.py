"""Read annotations in the formats of Pascal VOC and YOLO, and write COCO's."""
