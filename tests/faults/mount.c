/* A library to preload: gives the directory MOUNT the habits of common network mounts.
 *
 * All files there have names, and there is no fallocate.
 * MOUNT_OWNER=<uid>   all files show this owner (NFS all_squash, CIFS, WSL drives)
 * MOUNT_MODE=<octal>  all files show this mode
 * MOUNT_CHMOD=<errno> chmod fails (gcsfuse and others)
 * MOUNT_FLOCK=<errno> flock fails (Lustre, Cray DVS, NFS)
 * MOUNT_INODES=1      each look shows a new inode number (rclone renews them every few minutes)
 * MOUNT_STATFS=zero|<errno>  free space is unknown
 * MOUNT_DIRECT=<errno> writes past the page cache fail
 * MOUNT_PWRITE=ignored|<errno>  what is written goes to the end, or writing elsewhere fails
 * MOUNT_FSYNC=<errno>, MOUNT_DIRSYNC=<errno>, MOUNT_RENAME=<errno>  flushing a file or a directory,
 *                     or renaming, fails
 * MOUNT_RESERVE=<errno> is the error of fallocate, by default EOPNOTSUPP
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_under(const char *path) {
    const char *mount = getenv("MOUNT");
    char full[PATH_MAX * 2];
    if (!mount || !path)
        return 0;
    if (*path != '/') {
        if (!getcwd(full, PATH_MAX))
            return 0;
        strcat(strcat(full, "/"), path);
        path = full;
    }
    return !strncmp(path, mount, strlen(mount));
}

static int is_fd_under(int fd) {
    char link[64], path[PATH_MAX + 1];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX);
    if (length < 0)
        return 0;
    path[length] = 0;
    return is_under(path);
}

static int show(int result, int here, struct stat64 *found) {
    static unsigned long inode = 1 << 20;
    if (result || !here || !S_ISREG(found->st_mode))
        return result;
    if (getenv("MOUNT_OWNER"))
        found->st_uid = atoi(getenv("MOUNT_OWNER"));
    if (getenv("MOUNT_MODE"))
        found->st_mode = (found->st_mode & ~0777) | strtol(getenv("MOUNT_MODE"), 0, 8);
    if (getenv("MOUNT_INODES"))
        found->st_ino = inode++;
    return result;
}

static int refuse(const char *variable, int here) {
    if (!getenv(variable) || !here)
        return 0;
    errno = atoi(getenv(variable));
    return 1;
}

int fstat64(int fd, struct stat64 *found) {
    return show(REAL(fstat64)(fd, found), is_fd_under(fd), found);
}
int stat64(const char *path, struct stat64 *found) {
    return show(REAL(stat64)(path, found), is_under(path), found);
}
int lstat64(const char *path, struct stat64 *found) {
    return show(REAL(lstat64)(path, found), is_under(path), found);
}
int fstatat64(int fd, const char *path, struct stat64 *found, int flags) {
    return show(REAL(fstatat64)(fd, path, found, flags), is_under(path), found);
}
int fchmod(int fd, mode_t mode) {
    return refuse("MOUNT_CHMOD", is_fd_under(fd)) ? -1 : REAL(fchmod)(fd, mode);
}
int flock(int fd, int operation) {
    return refuse("MOUNT_FLOCK", is_fd_under(fd)) ? -1 : REAL(flock)(fd, operation);
}
int fallocate64(int fd, int mode, off64_t at, off64_t size) {
    if (!is_fd_under(fd))
        return REAL(fallocate64)(fd, mode, at, size);
    errno = getenv("MOUNT_RESERVE") ? atoi(getenv("MOUNT_RESERVE")) : EOPNOTSUPP;
    return -1;
}
int fallocate(int fd, int mode, off_t at, off_t size) { return fallocate64(fd, mode, at, size); }

static int space(int result, int here, struct statvfs64 *disk) {
    const char *wanted = getenv("MOUNT_STATFS");
    if (result || !here || !wanted)
        return result;
    if (!strcmp(wanted, "zero")) {
        disk->f_blocks = disk->f_bfree = disk->f_bavail = 0;
        return 0;
    }
    errno = atoi(wanted);
    return -1;
}
int fstatvfs64(int fd, struct statvfs64 *disk) {
    return space(REAL(fstatvfs64)(fd, disk), is_fd_under(fd), disk);
}
int statvfs64(const char *path, struct statvfs64 *disk) {
    return space(REAL(statvfs64)(path, disk), is_under(path), disk);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t at) {
    const char *habit = getenv("MOUNT_PWRITE");
    struct stat64 found;
    if (!is_fd_under(fd) || REAL(fstat64)(fd, &found))
        return REAL(pwrite64)(fd, data, length, at);
    if ((fcntl(fd, F_GETFL) & O_DIRECT) && refuse("MOUNT_DIRECT", 1))
        return -1;
    if (habit && at != found.st_size) {
        if (strcmp(habit, "ignored")) {
            errno = atoi(habit);
            return -1;
        }
        at = found.st_size;
    }
    return REAL(pwrite64)(fd, data, length, at);
}
ssize_t pwrite(int fd, const void *data, size_t length, off_t at) {
    return pwrite64(fd, data, length, at);
}

static int is_directory(int fd) {
    struct stat64 found;
    return !REAL(fstat64)(fd, &found) && S_ISDIR(found.st_mode);
}
int fsync(int fd) {
    const char *habit = is_directory(fd) ? "MOUNT_DIRSYNC" : "MOUNT_FSYNC";
    return refuse(habit, is_fd_under(fd)) ? -1 : REAL(fsync)(fd);
}
int fdatasync(int fd) {
    return refuse("MOUNT_FSYNC", is_fd_under(fd)) ? -1 : REAL(fdatasync)(fd);
}
int rename(const char *from, const char *to) {
    return refuse("MOUNT_RENAME", is_under(to)) ? -1 : REAL(rename)(from, to);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if ((flags & O_TMPFILE) == O_TMPFILE && is_under(path)) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return REAL(open64)(path, flags, mode);
}
int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return open64(path, flags, mode);
}
