/* Faults on demand for one process, loaded with LD_PRELOAD.
 *
 * FAULTS_ROOT     the tree whose files are meant (absolute, no symbolic links)
 * FAULTS_CONTROL  a file of four int64 that the test writes and this maps:
 *                   0  microseconds that each fsync and fdatasync in the tree takes longer
 *                   1  errno that every change in the tree fails with; 0: none
 *                   2  microseconds by which the wall clock is wrong
 *                   3  counts the changes that were refused
 *
 * A change is a write, a truncation, a sync, a name made or removed, a file opened for creation.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *control;
static char root[4096];
static size_t root_length;

static void *next_of(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) { fprintf(stderr, "faults: no %s\n", name); abort(); }
    return found;
}
#define NEXT(name) static __typeof__(&name) next; if (!next) next = next_of(#name)

__attribute__((constructor)) static void begin(void) {
    const char *tree = getenv("FAULTS_ROOT"), *path = getenv("FAULTS_CONTROL");
    if (!tree || !path) return;
    root_length = strlen(tree);
    memcpy(root, tree, root_length + 1);
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0) { perror("faults: control"); abort(); }
    void *mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapped == MAP_FAILED) { perror("faults: mmap"); abort(); }
    control = mapped;
    close(descriptor);
}

static int below(const char *path) {
    if (strncmp(path, root, root_length)) return 0;
    return path[root_length] == 0 || path[root_length] == '/';
}

static int inside(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Whether a change fails now; sets errno. */
static int refuse(int meant) {
    if (!control || !control[1] || !meant) return 0;
    __sync_fetch_and_add(&control[3], 1);
    errno = (int)control[1];
    return 1;
}
#define REFUSED(descriptor) (control && control[1] && refuse(inside(descriptor)))

static void dawdle(int descriptor) {
    if (control && control[0] && inside(descriptor)) usleep((useconds_t)control[0]);
}

/* ---- changes ---- */

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    return REFUSED(fd) ? -1 : next(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *pieces, int count) {
    NEXT(writev);
    return REFUSED(fd) ? -1 : next(fd, pieces, count);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    NEXT(pwrite64);
    return REFUSED(fd) ? -1 : next(fd, data, size, at);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    NEXT(pwrite);
    return REFUSED(fd) ? -1 : next(fd, data, size, at);
}
int ftruncate64(int fd, off64_t size) {
    NEXT(ftruncate64);
    return REFUSED(fd) ? -1 : next(fd, size);
}
int ftruncate(int fd, off_t size) {
    NEXT(ftruncate);
    return REFUSED(fd) ? -1 : next(fd, size);
}
int posix_fallocate64(int fd, off64_t at, off64_t size) {
    NEXT(posix_fallocate64);
    return REFUSED(fd) ? errno : next(fd, at, size);
}
int posix_fallocate(int fd, off_t at, off_t size) {
    NEXT(posix_fallocate);
    return REFUSED(fd) ? errno : next(fd, at, size);
}
int fsync(int fd) {
    NEXT(fsync);
    dawdle(fd);
    return REFUSED(fd) ? -1 : next(fd);
}
int fdatasync(int fd) {
    NEXT(fdatasync);
    dawdle(fd);
    return REFUSED(fd) ? -1 : next(fd);
}
int link(const char *from, const char *to) {
    NEXT(link);
    return refuse(below(to)) ? -1 : next(from, to);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    NEXT(linkat);
    return refuse(below(to)) ? -1 : next(a, from, b, to, flags);
}
int unlink(const char *path) {
    NEXT(unlink);
    return refuse(below(path)) ? -1 : next(path);
}
int rmdir(const char *path) {
    NEXT(rmdir);
    return refuse(below(path)) ? -1 : next(path);
}
int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    return refuse(below(path)) ? -1 : next(path, mode);
}

/* A file that exists may be opened: then its writes fail. */
#define OPEN(name, mode_of)                                                     \
    mode_t mode = 0;                                                            \
    if (flags & (O_CREAT | O_TMPFILE)) {                                        \
        va_list rest;                                                           \
        va_start(rest, flags);                                                  \
        mode = va_arg(rest, mode_t);                                            \
        va_end(rest);                                                           \
    }                                                                           \
    if (flags & O_CREAT && control && control[1] && below(path) &&              \
        access(path, F_OK) && refuse(1)) return -1;

int open(const char *path, int flags, ...) {
    NEXT(open);
    OPEN(open, mode)
    return next(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    NEXT(open64);
    OPEN(open64, mode)
    return next(path, flags, mode);
}

/* ---- the wall clock ---- */

int clock_gettime(clockid_t which, struct timespec *time) {
    NEXT(clock_gettime);
    int result = next(which, time);
    if (!result && control && which == CLOCK_REALTIME) {
        int64_t ns = time->tv_sec * 1000000000ll + time->tv_nsec + control[2] * 1000;
        time->tv_sec = ns / 1000000000;
        time->tv_nsec = ns % 1000000000;
    }
    return result;
}
